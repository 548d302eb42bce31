# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of SpQR weights: codes under scales that are codes themselves, and the outliers of a row."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import Decoder, WeightFormat, rounded
from quantcore_misc.spqr.format import Spqr


class Tiles(NamedTuple):
    """has_outliers, by_tiles: those of `Spqr`."""

    has_outliers: bool
    by_tiles: bool


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """The dense value, rounded to float16 after every operation, plus the outlier that stands there, in float32."""
    place = tl.load(tensors[4] + k)
    values = dense_values(tensors[0], place, n, K)
    if D.has_outliers:
        values = with_outliers(values, tensors[1], tensors[2], place, n, D)
    return values


@triton.jit
def dense_values(words, place, n, K):
    """float32: scale * (code - zero); of a tile of 16 x 16 each row is a word."""
    tile = words + ((n // 16) * ((K + 15) // 16) + place // 16) * 16
    word = tl.load(tile + n % 16)
    scale = scale_in_tile(tile, word, 0, 2)
    zero = scale_in_tile(tile, word >> 3, 1, 3)
    code = (word >> (6 + 3 * (place % 16)).to(tl.int64)) & 7
    return half(scale * half(code.to(tl.float32) - zero))


@triton.jit
def scale_in_tile(tile, word, SCALE: tl.constexpr, ZERO: tl.constexpr):
    """float32: the lowest 3 bits of a word less a zero, times a scale, by their places among the tile's numbers."""
    code = (word & 7).to(tl.float32)
    return half(number_of_tile(tile, SCALE) * half(code - number_of_tile(tile, ZERO)))


@triton.jit
def number_of_tile(tile, PLACE: tl.constexpr):
    """float32: a float16 whose bytes stand in the words of two pairs of rows."""
    low = (tl.load(tile + 4 * PLACE) >> 54) & 0xFF
    high = (tl.load(tile + 4 * PLACE + 2) >> 54) & 0xFF
    return float16_of(low | (high << 8))


@triton.jit
def with_outliers(values, offsets, entries, place, n, D: tl.constexpr):
    """Values with the outliers of each row that stand in these columns; a row's are gone through one by one."""
    STEP: tl.constexpr = 16 if D.by_tiles else 1
    if D.by_tiles:
        first = tl.load(offsets + n // 16) + (n % 16).to(tl.int32)
        end = tl.load(offsets + n // 16 + 1)
    else:
        first = tl.load(offsets + n)
        end = tl.load(offsets + n + 1)
    most = tl.max((end - first + STEP - 1) // STEP)
    for i in range(most):
        at = first + i * STEP
        entry = tl.load(entries + at, mask=at < end, other=0)
        is_here = (at < end) & ((entry & 0xFFFF) == place)
        values = tl.where(is_here, values + float16_of(entry >> 16), values)
    return values


@triton.jit
def float16_of(bits):
    """float32 of the lowest 16 bits of integers, as those of a float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def half(values):
    """float32 of values rounded to float16."""
    return rounded(values, tl.float16).to(tl.float32)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of SpQR's weights; None for any other format."""
    if not isinstance(weight_format, Spqr):
        return None
    by_tiles = weight_format.by_tiles
    return Decoder(
        name=f"spqr with outliers by {'tiles' if by_tiles else 'rows'}",
        decode=decode,
        constants=Tiles(weight_format.outlier_type == "int32", by_tiles),
        views=(None,) * 5,
        dtype=torch.float16,
    )
