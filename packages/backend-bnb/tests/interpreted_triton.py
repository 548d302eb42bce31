"""The 4-bit decoder of blocks that no example config asks for, in Triton's interpreter: run with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch

from quantcore.kernels.triton.checks import check_dequantize
from quantcore.testing.decoders import faults_interpreted
from quantcore_bnb.bitsandbytes.decode import decoder_for
from quantcore_bnb.bitsandbytes.format import Bnb4Bit

FORMATS = {
    "nf4": Bnb4Bit("nf4"),
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
    "two_nested_blocks": (34, 515),
}
ALL = pytest.mark.parametrize("name", FORMATS)


@ALL
def test_blocks_that_cross_rows_are_gathered(name: str) -> None:
    assert not decoder_for(FORMATS[name]).fits_tiles(33, 80)
    assert faults_interpreted(FORMATS[name], decoder_for(FORMATS[name]), (33, 80)) == {}


@ALL
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dequantize_gives_the_formats_own_numbers(name: str, shape: tuple[int, int]) -> None:
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), shape, torch.float32)


@ALL
def test_whole_blocks_fit_tiles(name: str) -> None:
    shape = (3, 2 * FORMATS[name].blocksize)
    assert decoder_for(FORMATS[name]).fits_tiles(*shape)
    check_dequantize(FORMATS[name], decoder_for(FORMATS[name]), shape, torch.float32)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "float64", "int8"])
def test_packed_bytes_are_viewed_whatever_their_storage_dtype(storage: str) -> None:
    weight_format = Bnb4Bit("nf4", storage=storage)
    check_dequantize(weight_format, decoder_for(weight_format), (6, 80), torch.float32)
