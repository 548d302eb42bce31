"""Module paths that code written for transformers expects; nothing is defined here."""
