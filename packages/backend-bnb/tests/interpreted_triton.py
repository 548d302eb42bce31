"""The 4-bit decoder in every skeleton, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from quantcore.kernels import reference
from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import (
    check_dequantize,
    check_grouped,
    check_input_grad,
    check_linear,
    quantized,
)
from quantcore_bnb.bitsandbytes import triton_kernels
from quantcore_bnb.bitsandbytes.decode import decoder_for
from quantcore_bnb.bitsandbytes.format import Bnb4Bit

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMATS = {
    "nf4": Bnb4Bit("nf4"),
    "nf4_nested": Bnb4Bit("nf4", double_quant=True),
    "fp4": Bnb4Bit("fp4"),
    "fp4_nested_bf16": Bnb4Bit("fp4", double_quant=True, compute_dtype="bfloat16"),
    "nf4_blocks_of_32": Bnb4Bit("nf4", blocksize=32, compute_dtype="float16"),
    "nf4_blocks_of_4096": Bnb4Bit("nf4", blocksize=4096),
    "fp4_blocks_of_6": Bnb4Bit("fp4", blocksize=6, double_quant=True, nested_blocksize=256),
}
SHAPES = {
    "one_weight": (1, 1),
    "one_row_odd": (1, 131),
    "one_column": (9, 1),
    "primes": (7, 5),
    "blocks_cross_rows": (33, 80),
    "two_nested_blocks": (34, 515),
}
ALL = pytest.mark.parametrize("name", FORMATS)
SOME = pytest.mark.parametrize("name", ["nf4", "fp4_nested_bf16", "nf4_blocks_of_32"])


@ALL
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dequantize_gives_the_formats_own_numbers(name: str, shape: tuple[int, int]) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), shape, torch.float32)


@DTYPES
@ALL
def test_dequantize_rounds_once(name: str, dtype: torch.dtype) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), (33, 80), dtype)


@ALL
def test_wide_indices_decode_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), (33, 80), torch.float32)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "float64", "int8"])
def test_packed_bytes_are_viewed_whatever_their_storage_dtype(storage: str) -> None:
    weight_format = Bnb4Bit("nf4", storage=storage)
    check_dequantize(weight_format, decoder_for(weight_format), (6, 80), torch.float32)


@DTYPES
@SOME
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(1, 131), (33, 80)], ids=str)
def test_gemv_matches_reference(name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    x, bias = torch.randn(rows, shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    check_linear(launch.gemv, FORMATS[name], decoder_for(FORMATS[name]), x, shape[0], bias)


@DTYPES
@SOME
@pytest.mark.parametrize("rows", [3, 67])
@pytest.mark.parametrize("shape", [(1, 131), (70, 80)], ids=str)
def test_gemm_matches_reference(name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    x, bias = torch.randn(rows, shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    check_linear(launch.gemm, FORMATS[name], decoder_for(FORMATS[name]), x, shape[0], bias)


@DTYPES
@ALL
def test_input_gradient_is_the_references(name: str, dtype: torch.dtype) -> None:
    check_input_grad(FORMATS[name], decoder_for(FORMATS[name]), torch.randn(3, 33).to(dtype), 80)


@DTYPES
@pytest.mark.parametrize("name", ["nf4", "nf4_nested", "fp4_nested_bf16"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (33, 640)], ids=str)
def test_tiles_match_reference(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    decoder = decoder_for(FORMATS[name])
    assert decoder.fits_tiles(*shape)
    check_dequantize(FORMATS[name], decoder, shape, dtype)
    bias = torch.randn(shape[0], dtype=dtype)
    for call, rows in ((launch.gemv, 1), (launch.gemv, 2), (launch.gemm, 17)):
        x = torch.randn(rows + 1, shape[1], 2).to(dtype)[1:, :, 1]
        check_linear(call, FORMATS[name], decoder, x, shape[0], bias)


@pytest.mark.parametrize("name", FORMATS)
def test_whole_blocks_fit_tiles(name: str) -> None:
    blocksize = FORMATS[name].blocksize
    assert decoder_for(FORMATS[name]).fits_tiles(3, 2 * blocksize)
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), (3, 2 * blocksize), torch.float32)


def test_experts_match_reference() -> None:
    check_grouped(FORMATS["nf4_nested"], decoder_for(FORMATS["nf4_nested"]), [5, 0, 3], (7, 128), torch.bfloat16)


def test_offered_kernel_multiplies_all_experts_at_once() -> None:
    weight_format, shape = FORMATS["nf4"], (9, 128)
    experts = [list(quantized(weight_format, shape, seed).values()) for seed in range(3)]
    x, ends = torch.randn(5, shape[1]), torch.tensor([2, 2, 5], dtype=torch.int32)
    offered = next(kernel for kernel in triton_kernels() if kernel.grouped_linear)
    found = offered.grouped_linear(x, ends, experts, weight_format, shape[0])
    expected = reference.grouped_linear(x, ends, experts, weight_format, shape[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # 128 products in another order


def test_blocks_that_cross_rows_are_gathered() -> None:
    assert not decoder_for(FORMATS["nf4"]).fits_tiles(33, 80)
