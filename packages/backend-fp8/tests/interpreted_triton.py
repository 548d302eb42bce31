"""Decoders that no example config asks for and the product of blocks, in Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.formats.activation import Activation
from quantcore.kernels import reference
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, poisoned_buffers, quantized
from quantcore.kernels.triton.kernels import scaled_kernels
from quantcore.kernels.triton.scaled import decoder_for
from quantcore.sdk import Scale
from quantcore.testing.decoders import faults_interpreted
from quantcore_fp8.block_matmul import block_matmul
from quantcore_fp8.format import ROW, TENSOR, Fp8, fp4_expert

FORMATS = {
    "blocks_of_three_by_five": Fp8(block=(3, 5), dtype="float32"),
    "rows_under_bfloat16": Fp8(block=ROW, scale=Scale("weight_scale_inv", dtype="bfloat16"), dtype="float32"),
    "fp4": fp4_expert(dtype="float32"),
}
TENSOR_SCALE = Fp8(block=TENSOR, scale=Scale("weight_scale_inv", rank=0), dtype="float32")


@pytest.mark.parametrize("name", FORMATS)
def test_decoder_gives_the_numbers_of_the_format(name: str) -> None:
    assert faults_interpreted(FORMATS[name], decoder_for(FORMATS[name]), (7, 160)) == {}
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), (130, 288), torch.float32)  # several tiles


@pytest.mark.parametrize(("shape", "dtype"), [((1, 32), torch.float32), ((131, 129), torch.bfloat16)], ids=str)
def test_scale_of_the_whole_weight_may_be_a_scalar(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_dequantize(TENSOR_SCALE, decoder_for(TENSOR_SCALE), shape, dtype)


def test_experts_at_once_round_their_input_as_each_does() -> None:
    weight_format, shape = Fp8(input=Activation("e4m3", "group", 128), dtype="float32"), (9, 160)
    experts = [list(quantized(weight_format, shape, seed).values()) for seed in range(3)]
    x, ends = torch.randn(5, shape[1]), torch.tensor([2, 2, 5], dtype=torch.int32)
    offered = next(kernel for kernel in scaled_kernels() if kernel.grouped_linear)
    found = offered.grouped_linear(x, ends, experts, weight_format, shape[0])
    expected = reference.grouped_linear(x, ends, experts, weight_format, shape[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # 160 products in another order


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (3, 130, 257), (70, 66, 128)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (1, 32)], ids=str)
def test_product_of_blocks_matches_reference(M: int, N: int, K: int, block: tuple[int, int]) -> None:
    rounding = Activation("e4m3", "group", block[1])
    weight_format = Fp8(block=block, input=rounding, dtype="float32")
    operands = quantized(weight_format, (N, K))
    x = torch.randn(M, K)
    with poisoned_buffers():
        scale, _ = weight_format.tables(operands, (N, K))
        y = block_matmul(rounding.quantize(x), operands["weight"], scale, block, torch.float32)
    expected = weight_format.linear(x, operands, None, (N, K))
    # float32 sums in another order; products here are scaled after they are summed.
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_every_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(8, 32)
    operands = [codes.view(torch.float8_e4m3fn), torch.tensor(1.0)]
    found = launch.dequantize(operands, decoder_for(TENSOR_SCALE), (8, 32), torch.float32)
    assert torch.equal(found.nan_to_num(1000.0), codes.view(torch.float8_e4m3fn).float().nan_to_num(1000.0))
