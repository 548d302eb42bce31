"""Triton skeletons: kernels written once, to which a backend hands the decoder of its weight format.

`decoder` and `kernels` import no triton; the other modules do, and are imported when a kernel first runs on a GPU.
"""
