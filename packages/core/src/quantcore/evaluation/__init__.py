"""How good a quantized model is: perplexity on a text, and distance from a reference model."""
