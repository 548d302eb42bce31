"""The GPU kernels that also run on a CPU, called by name and compared with the reference."""

from __future__ import annotations

import pytest
import torch

from quantcore.kernels.triton.checks import quantized
from quantcore.sdk import Scale
from quantcore.testing.torch_cpu import needs_float8_rows
from quantcore_fp8.format import ROW, ROW_INPUT, STATIC_INPUT, TENSOR, Fp8
from quantcore_fp8.kernels import fp8_kernels

KERNELS = {kernel.name: kernel for kernel in fp8_kernels()}
FORMATS = {
    "rows": Fp8(block=ROW, input=ROW_INPUT),
    "tensor": Fp8(block=TENSOR, scale=Scale("weight_scale_inv", rank=0), input=ROW_INPUT),
    "static": Fp8(block=TENSOR, input=STATIC_INPUT),
}


@needs_float8_rows
@pytest.mark.parametrize("leading", [(5,), (2, 3), (1,)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_scaled_product_matches_reference(name: str, leading: tuple[int, ...]) -> None:
    weight_format, shape = FORMATS[name], (48, 64)
    named = quantized(weight_format, shape)
    x, bias = torch.randn(*leading, 64).bfloat16(), torch.randn(48).bfloat16()
    found = KERNELS["scaled_mm_fp8"].linear(x, list(named.values()), bias, weight_format, 48)
    expected = weight_format.linear(x, named, bias, shape)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # One bfloat16 step of the product, before and after the bias is added.
    assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=2**-6)


def test_methods_share_their_kernels() -> None:
    assert fp8_kernels() is fp8_kernels()
    assert set(KERNELS) >= {"scaled_mm_fp8", "blocks_fp8"}
