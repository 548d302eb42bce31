"""The torch op on quantized weights, the kernels that serve it, and how one of them is chosen."""
