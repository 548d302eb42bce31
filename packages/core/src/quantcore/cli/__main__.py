"""`python -m quantcore.cli`: the command without its script."""

from __future__ import annotations

from quantcore.cli import main

main(prog_name="quantcore")
