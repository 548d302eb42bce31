"""Reading, writing and streaming of checkpoints. Only safetensors is opened: nothing that could execute code."""
