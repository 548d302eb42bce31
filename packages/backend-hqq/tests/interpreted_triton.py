"""The decoders of hqq and sinq for layouts that no example asks for, in Triton's interpreter: TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton.checks import check_dequantize
from quantcore.testing.decoders import faults_interpreted
from quantcore_hqq.hqq.decode import decoder_for
from quantcore_hqq.hqq.format import Hqq
from quantcore_hqq.sinq.decode import decoder_for as sinq_decoder
from quantcore_hqq.sinq.format import SinqTiles, sinq_format

COMPUTE = pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
AXIS = pytest.mark.parametrize("axis", [0, 1])
BITS = pytest.mark.parametrize("bits", [8, 6, 4, 3, 2, 1.58, 1])


def hqq(bits: float, axis: int, compute: str, **fields: object) -> Hqq:
    return Hqq(bits=bits, axis=axis, compute_dtype=compute, optimize=False, **{"group_size": 16, **fields})


def strips(bits: float, compute: str, method: str = "sinq_quantAux") -> WeightFormat:
    """The stored weight, whose columns were scaled with the input before."""
    return sinq_format(bits, 32, method, compute_dtype=compute).untransformed()


@COMPUTE
@BITS
@AXIS
def test_dequantize_gives_the_formats_own_numbers(bits: float, axis: int, compute: str) -> None:
    weight_format = hqq(bits, axis, compute)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


@COMPUTE
@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (3, 0), (8, 0), (1, 0)])
def test_decoder_gives_the_numbers_of_the_format(bits: float, axis: int, compute: str) -> None:
    weight_format = hqq(bits, axis, compute)
    assert faults_interpreted(weight_format, decoder_for(weight_format), (24, 80)) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantize_rounds_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    weight_format = hqq(4, 1, "float32")
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), dtype)


@BITS
@AXIS
def test_whole_rows_and_columns_are_groups(bits: float, axis: int) -> None:
    weight_format = hqq(bits, axis, "bfloat16", group_size=None)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 40), torch.bfloat16)


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


@BITS
def test_one_range_spans_the_weight(bits: float) -> None:
    weight_format = hqq(bits, 1, "bfloat16", channel_wise=False)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 40), torch.float32)


@COMPUTE
@pytest.mark.parametrize("bits", [8, 3, 1])
def test_words_viewed_as_floats_are_viewed_back(bits: float, compute: str) -> None:
    weight_format = hqq(bits, 1, compute, view_as_float=True)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


@COMPUTE
def test_tiles_give_the_numbers_of_the_format(compute: str) -> None:
    weight_format = hqq(4, 1, compute, group_size=64)
    assert decoder_for(weight_format).fits_tiles(22, 192)
    assert faults_interpreted(weight_format, decoder_for(weight_format), (22, 192)) == {}


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("group_size", [None, 16, 40])
def test_every_width_of_whole_words_fits_tiles(bits: float, group_size: int | None) -> None:
    weight_format = hqq(bits, 1, "float16", group_size=group_size)
    assert decoder_for(weight_format).fits_tiles(24, 80)
    check_dequantize(weight_format, decoder_for(weight_format), (24, 80), torch.float32)


def test_an_odd_number_of_rows_is_gathered() -> None:
    assert not decoder_for(hqq(4, 1, "float32", group_size=64)).fits_tiles(33, 128)


@pytest.mark.parametrize("compute", ["float32", "float16"])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1])
def test_strips_of_sinq_give_their_own_numbers(bits: float, compute: str) -> None:
    weight_format = strips(bits, compute)
    check_dequantize(weight_format, sinq_decoder(weight_format), (32, 64), torch.float32)


@pytest.mark.parametrize("bits", [5, 4])
def test_products_of_sinq_match_reference(bits: float) -> None:
    weight_format = strips(bits, "float32", "sinq")
    assert faults_interpreted(weight_format, sinq_decoder(weight_format), (32, 64)) == {}


def test_squares_and_levels_of_sinq_have_no_decoder() -> None:
    assert sinq_decoder(strips(4, "float32")).fits_tiles(32, 64)
    assert sinq_decoder(SinqTiles(is_square=True)) is None
    assert sinq_decoder(sinq_format(4, 32, "sinq_nf4")) is None
