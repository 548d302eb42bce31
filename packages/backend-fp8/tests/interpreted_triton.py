"""The decoders and the product of blocks in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantcore.formats.activation import Activation
from quantcore.kernels import reference
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_linear, poisoned_buffers, quantized
from quantcore_fp8.block_matmul import block_matmul
from quantcore_fp8.decode import decoder_for
from quantcore_fp8.format import ROW, TENSOR, Fp8
from quantcore_fp8.format_fp4 import Fp4Expert
from quantcore_fp8.kernels import fp8_kernels

FORMATS = {
    "blocks": Fp8(dtype="float32"),
    "blocks_of_three_by_five": Fp8(block=(3, 5), dtype="float32"),
    "tensor": Fp8(block=TENSOR, scale_rank=0, dtype="float32"),
    "rows": Fp8(block=ROW, scale_dtype="bfloat16", dtype="float32"),
    "mx": Fp8(block=(1, 32), scale_dtype="uint8", power_of_two=True, dtype="float32"),
    "fp4": Fp4Expert(dtype="float32"),
}
ALL = pytest.mark.parametrize("name", FORMATS)


@ALL
@pytest.mark.parametrize("shape", [(1, 32), (7, 160), (130, 288)], ids=str)
def test_dequantize_gives_the_formats_own_numbers(name: str, shape: tuple[int, int]) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), shape, torch.float32)


@pytest.mark.parametrize("name", ["blocks", "tensor", "rows"])
def test_ragged_edges_are_gathered(name: str) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), (131, 129), torch.bfloat16)


@ALL
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_matches_reference(name: str, rows: int) -> None:
    check_linear(launch.gemv, FORMATS[name], decoder_for(FORMATS[name]), torch.randn(rows, 160), 33, torch.randn(33))


@pytest.mark.parametrize("name", ["blocks", "mx", "fp4"])
def test_gemm_and_experts_match_reference(name: str) -> None:
    check_linear(launch.gemm, FORMATS[name], decoder_for(FORMATS[name]), torch.randn(17, 160).bfloat16(), 33)
    check_grouped(FORMATS[name], decoder_for(FORMATS[name]), (2, 0, 3), (9, 64), torch.float32)


def test_experts_at_once_round_their_input_as_each_does() -> None:
    weight_format, shape = Fp8(activation=Activation("e4m3", "group", 128), dtype="float32"), (9, 160)
    experts = [list(quantized(weight_format, shape, seed).values()) for seed in range(3)]
    x, ends = torch.randn(5, shape[1]), torch.tensor([2, 2, 5], dtype=torch.int32)
    offered = next(kernel for kernel in fp8_kernels() if kernel.grouped_linear)
    found = offered.grouped_linear(x, ends, experts, weight_format, shape[0])
    expected = reference.grouped_linear(x, ends, experts, weight_format, shape[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # 160 products in another order


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (3, 130, 257), (70, 66, 128)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (1, 32)], ids=str)
def test_product_of_blocks_matches_reference(M: int, N: int, K: int, block: tuple[int, int]) -> None:
    rounding = Activation("e4m3", "group", block[1])
    weight_format = Fp8(block=block, activation=rounding, dtype="float32")
    operands = quantized(weight_format, (N, K))
    x = torch.randn(M, K)
    with poisoned_buffers():
        scale = weight_format.scales(operands, (N, K))
        y = block_matmul(rounding.quantize(x), operands["weight"], scale, block, torch.float32)
    expected = weight_format.linear(x, operands, None, (N, K))
    # float32 sums in another order; products here are scaled after they are summed.
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4)


def test_every_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(8, 32)
    weight_format = replace(FORMATS["tensor"], scale_rank=0)
    operands = [codes.view(torch.float8_e4m3fn), torch.tensor(1.0)]
    found = launch.dequantize(operands, decoder_for(weight_format), (8, 32), torch.float32)
    assert torch.equal(found.nan_to_num(1000.0), codes.view(torch.float8_e4m3fn).float().nan_to_num(1000.0))
