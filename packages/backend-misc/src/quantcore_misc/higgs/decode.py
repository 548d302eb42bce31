# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of HIGGS weights: pairs of columns share a run of bits that is the number of a pair of grid values."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat, float_dtype, places, rounded
from quantcore_misc.higgs.format import Higgs
from quantcore_misc.higgs.layout import TILE_PLACES, rows_of_block


class Pairs(NamedTuple):
    """code_bits: of a code. tile: rows side by side, of `block` rows in all. group: columns of a scale.

    order: of the tiles of a block, in 3 bits, the places in which they lie, as `places` writes them.
    """

    code_bits: int
    tile: int
    block: int
    group: int
    order: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """A grid value times the scale of its group, rounded once; tensors as `Higgs` stores them."""
    if D.code_bits == 3:
        number = three_bit_pairs(tensors[0], k, n, N, K, D)
    else:
        number = even_pairs(tensors[0], k, n, K, D)
    value = tl.load(tensors[3] + number * 2 + k % 2).to(tl.float32)
    scale = tl.load(tensors[1] + n * (K // D.group) + k // D.group).to(tl.float32)
    return rounded(value * scale, D.rounds).to(tl.float32)


@triton.jit
def even_pairs(words, k, n, K, D: tl.constexpr):
    """int32: numbers of pairs of 2 or 4 bits a code; the two words of a pair of columns are the halves of a block."""
    HALF: tl.constexpr = D.block // 2
    row = n // D.block * D.tile + n % D.tile
    word = tl.load(words + row * K + k // 2 * 2 + n % D.block // HALF).to(tl.int32)
    shift = n % HALF // D.tile * (2 * D.code_bits)
    return (word >> shift.to(tl.int32)) & ((1 << 2 * D.code_bits) - 1)


@triton.jit
def three_bit_pairs(words, k, n, N, K, D: tl.constexpr):
    """int32: numbers of pairs of 3 bits a code: five in the low bits of each of three words, one in their top bits."""
    place = ((D.order >> (n % D.block // D.tile * 4).to(tl.int64)) & 0xF).to(tl.int32)
    word = whole_word(words, tl.minimum(place // 5, 2), k, n, N, K, True, D)
    number = (word >> (place % 5 * 6)) & 63
    for i in tl.static_range(3):
        upper = (whole_word(words, i, k, n, N, K, place == 15, D) >> 30) & 3
        number = tl.where(place == 15, (number & ~(3 << 2 * i)) | (upper << 2 * i), number)
    return number


@triton.jit
def whole_word(words, i, k, n, N, K, wanted, D: tl.constexpr):
    """int32 of word i of the three that hold a block's pair of columns: its low and its high half lie side by side."""
    blocks, block = N // D.block, n // D.block
    first = tl.where(i == 0, block, blocks + block * 2 + i - 1)
    place = words + (first * D.tile + n % D.tile) * K + k // 2 * 2
    low = tl.load(place, mask=wanted, other=0).to(tl.int32) & 0xFFFF
    return low | (tl.load(place + 1, mask=wanted, other=0).to(tl.int32) << 16)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of weights whose input is rotated already; None for any other format."""
    if not isinstance(weight_format, Higgs) or weight_format.transform is not None:
        return None
    floats, bits = float_dtype(weight_format.float_type, "float_type"), weight_format.bits
    if floats not in TRITON_DTYPES or floats.itemsize != 2:  # the grid's pairs are stored under two bytes each
        return None
    block = rows_of_block(bits, weight_format.tile)
    tile = weight_format.tile if bits != 3 else block // len(TILE_PLACES)
    return Decoder(
        name=f"higgs {bits} bits tile {tile} group {weight_format.group_size}",
        decode=decode,
        constants=Pairs(bits, tile, block, weight_format.group_size, places(*TILE_PLACES)),
        views=(None, None, None, floats),
        dtype=floats,
        rounds=floats,
    )
