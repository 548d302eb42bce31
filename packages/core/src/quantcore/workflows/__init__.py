"""What is done with whole models and checkpoints: load, save, quantize, convert. Above the quantizers."""
