"""The HQQ decoder in every skeleton, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from quantcore.kernels.triton import launch
from quantcore.kernels.triton.checks import check_dequantize, check_grouped, check_input_grad, check_linear
from quantcore_hqq.hqq.decode import decoder_for
from quantcore_hqq.hqq.format import Hqq

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
COMPUTE = pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
AXIS = pytest.mark.parametrize("axis", [0, 1])
BITS = pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1.58, 1])


def hqq(bits: float, axis: int, compute: str, **fields: object) -> Hqq:
    return Hqq(bits=bits, axis=axis, compute_dtype=compute, optimize=False, **{"group_size": 16, **fields})


@COMPUTE
@BITS
@AXIS
def test_dequantize_gives_the_formats_own_numbers(bits: float, axis: int, compute: str) -> None:
    weight_format = hqq(bits, axis, compute)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


@DTYPES
def test_dequantize_rounds_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    weight_format = hqq(4, 1, "float32")
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), dtype)


@BITS
@AXIS
@pytest.mark.parametrize("shape", [(24, 40)], ids=str)
def test_whole_rows_and_columns_are_groups(bits: float, axis: int, shape: tuple[int, int]) -> None:
    weight_format = hqq(bits, axis, "bfloat16", group_size=None)
    check_dequantize(weight_format, decoder_for(weight_format), shape, torch.bfloat16)


@AXIS
@pytest.mark.parametrize("shape", [(13, 7), (1, 1), (1, 9), (9, 1)], ids=str)
def test_padded_words_of_three_bits(axis: int, shape: tuple[int, int]) -> None:
    weight_format = hqq(3, axis, "float32", group_size=None)
    check_dequantize(weight_format, decoder_for(weight_format), shape, torch.float32)


@AXIS
@BITS
def test_groups_cross_rows(axis: int, bits: float) -> None:
    weight_format = hqq(bits, axis, "float16", group_size=64)
    check_dequantize(weight_format, decoder_for(weight_format), (64, 40), torch.float16)


@AXIS
@pytest.mark.parametrize("bits", [8, 3, 1])
def test_wide_indices_decode_the_same(axis: int, bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_index_type", lambda N, K: tl.int64)
    weight_format = hqq(bits, axis, "float32")
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


@BITS
def test_one_range_spans_the_weight(bits: float) -> None:
    weight_format = hqq(bits, 1, "bfloat16", channel_wise=False)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 40), torch.float32)


@COMPUTE
@pytest.mark.parametrize("bits", [8, 3, 1])
def test_words_viewed_as_floats_are_viewed_back(bits: float, compute: str) -> None:
    weight_format = hqq(bits, 1, compute, view_as_float=True)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


@DTYPES
@COMPUTE
@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (3, 0)])
@pytest.mark.parametrize("rows", [1, 3])
def test_gemv_matches_reference(bits: float, axis: int, compute: str, rows: int, dtype: torch.dtype) -> None:
    weight_format = hqq(bits, axis, compute)
    x, bias = torch.randn(rows, 80, dtype=dtype), torch.randn(24, dtype=dtype)
    check_linear(launch.gemv, weight_format, decoder_for(weight_format), x, 24, bias)


@DTYPES
@COMPUTE
@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (8, 0), (2, 1), (1, 0)])
def test_gemm_matches_reference(bits: float, axis: int, compute: str, dtype: torch.dtype) -> None:
    weight_format = hqq(bits, axis, compute)
    x = torch.randn(17, 80, dtype=dtype)
    check_linear(launch.gemm, weight_format, decoder_for(weight_format), x, 72)


@DTYPES
@pytest.mark.parametrize("bits", [8, 3, 1])
def test_input_gradient_is_the_references(bits: float, dtype: torch.dtype) -> None:
    weight_format = hqq(bits, 1, "bfloat16")
    check_input_grad(weight_format, decoder_for(weight_format), torch.randn(3, 24).to(dtype), 80)


@DTYPES
@COMPUTE
@pytest.mark.parametrize("shape", [(2, 64), (22, 640)], ids=str)
def test_tiles_match_reference(shape: tuple[int, int], compute: str, dtype: torch.dtype) -> None:
    weight_format = hqq(4, 1, compute, group_size=64)
    decoder = decoder_for(weight_format)
    assert decoder.fits_tiles(*shape)
    bias = torch.randn(shape[0], dtype=dtype)
    for call, rows in ((launch.gemv, 1), (launch.gemv, 2), (launch.gemm, 17)):
        x = torch.randn(rows + 1, shape[1], 2).to(dtype)[1:, :, 1]
        check_linear(call, weight_format, decoder, x, shape[0], bias)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("group_size", [None, 16, 40])
def test_every_width_of_whole_words_fits_tiles(bits: float, group_size: int | None) -> None:
    weight_format = hqq(bits, 1, "float16", group_size=group_size)
    decoder = decoder_for(weight_format)
    assert decoder.fits_tiles(24, 80)
    check_dequantize(weight_format, decoder, (24, 80), torch.float32)


def test_experts_match_reference() -> None:
    weight_format = hqq(4, 1, "bfloat16", group_size=64)
    check_grouped(weight_format, decoder_for(weight_format), [5, 0, 3], (6, 128), torch.bfloat16)


def test_an_odd_number_of_rows_is_gathered() -> None:
    assert not decoder_for(hqq(4, 1, "float32", group_size=64)).fits_tiles(33, 128)
