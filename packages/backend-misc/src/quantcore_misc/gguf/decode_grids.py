# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of block types that no row of `SCALED` describes: vectors of a grid, from `GRIDS`, and TQ1_0."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import float16_values
from quantcore_misc.gguf.types import block_type

ELEMENTS = tl.constexpr(256)  # of a block of any of these types
SHIFT = tl.constexpr(0.125)  # of the vectors of IQ1
DIGITS = tl.constexpr(160)  # of TQ1_0 in its first run of bytes
LAST_DIGITS = tl.constexpr(240)  # where the digits of the field qh begin


class Grids(NamedTuple):
    """One block type of vectors. Places are bytes from the start of a block.

    size: values of a vector. number: where the bits of its number are that stand apart from its byte at index_at:
    "" for none, "words" for a number in a word of 16 bits with its signs, "planes" for high_bits each at high_at,
    "threes" for three of each word of 16 bits, "nibbles" for the lower three of four. stride: bytes of four numbers.
    signs: "bytes" of eight values at signs_at; "words" of 32 bits, each signs_stride bytes, that hold four indices of
    7 bits; "numbers" for those beside the number; "shifts" for the bit above the number's bits, in place of signs.
    scale: "nibbles" at scale_at, "words" for the top of a word with signs, "threes" for three bits above the numbers'
    in their words, "spread" for three bits of words whose top bits are those of d.
    group: values that share a scale. low, step, half: factor = d * (low + step * number) * half.
    """

    nbytes: int
    size: int
    number: str
    index_at: int
    stride: int
    high_at: int
    high_bits: int
    signs: str
    signs_at: int
    signs_stride: int
    scale: str
    scale_at: int
    d_at: int
    group: int
    low: float
    step: float
    half: float


class Digits(NamedTuple):
    """A block of TQ1_0. Places are bytes from the start of a block."""

    nbytes: int
    d_at: int


def _grids(name: str, **fields: Any) -> Grids:
    plain = {"number": "", "index_at": 2, "stride": 4, "high_at": 0, "high_bits": 0, "signs_at": 0, "signs_stride": 0}
    rest = {"scale_at": 0, "d_at": 0, "low": 0.5, "step": 1.0, "half": 0.25}
    return Grids(nbytes=block_type(name).nbytes, **{**plain, **rest, **fields})


GRIDS = {
    "IQ2_XXS": _grids("IQ2_XXS", size=8, stride=8, signs="words", signs_at=6, signs_stride=8, scale="words", group=32),
    "IQ2_XS": _grids("IQ2_XS", size=8, number="words", signs="numbers", scale="nibbles", scale_at=66, group=16),
    "IQ2_S": _grids(
        "IQ2_S",
        size=8,
        number="planes",
        high_at=66,
        high_bits=2,
        signs="bytes",
        signs_at=34,
        scale="nibbles",
        scale_at=74,
        group=16,
    ),
    "IQ3_XXS": _grids("IQ3_XXS", size=4, signs="words", signs_at=66, signs_stride=4, scale="words", group=32, half=0.5),
    "IQ3_S": _grids(
        "IQ3_S",
        size=4,
        number="planes",
        high_at=66,
        high_bits=1,
        signs="bytes",
        signs_at=74,
        scale="nibbles",
        scale_at=106,
        group=32,
        low=1.0,
        step=2.0,
        half=1.0,
    ),
    "IQ1_S": _grids(
        "IQ1_S",
        size=8,
        number="threes",
        high_at=34,
        signs="shifts",
        scale="threes",
        group=32,
        low=1.0,
        step=2.0,
        half=1.0,
    ),
    "IQ1_M": _grids(
        "IQ1_M",
        size=8,
        number="nibbles",
        index_at=0,
        high_at=32,
        signs="shifts",
        scale="spread",
        scale_at=48,
        group=16,
        low=1.0,
        step=2.0,
        half=1.0,
    ),
}


def digits() -> Digits:
    """The constants of TQ1_0, whose scale is the last field."""
    nbytes = block_type("TQ1_0").nbytes
    return Digits(nbytes, nbytes - 2)


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """factor * entry of a vector, signed or shifted; tensors are the rows of blocks, and the grid as int8."""
    block = tensors[0] + (n * (K // ELEMENTS) + k // ELEMENTS).to(tl.int64) * D.nbytes
    element = k % ELEMENTS
    vector = element // D.size
    entry = tl.load(tensors[1] + number_of(block, vector, D) * D.size + element % D.size).to(tl.float32)
    factor = factor_of(block, element // D.group, D)
    if D.signs == "shifts":
        shift = tl.where(is_lowered(block, vector, D), -SHIFT, SHIFT)
        values = (entry + shift) * factor
    else:
        is_negative = (signs_of(block, element // 8, D) >> (element % 8)) & 1
        values = entry * factor
        values = tl.where(is_negative != 0, -values, values)
    return values


@triton.jit
def word_at(address):
    """int32 of 16 bits at any address."""
    return tl.load(address).to(tl.int32) | (tl.load(address + 1).to(tl.int32) << 8)


@triton.jit
def nibble_at(address, i):
    """int32: nibble i, the low one of a byte first."""
    return (tl.load(address + i // 2).to(tl.int32) >> (i % 2 * 4)) & 15


@triton.jit
def number_of(block, v, D: tl.constexpr):
    """int32: which entry of the grid vector v is."""
    if D.number == "words":
        number = word_at(block + D.index_at + 2 * v) & 511
    else:
        number = tl.load(block + D.index_at + v // 4 * D.stride + v % 4).to(tl.int32)
        if D.number == "planes":
            A_BYTE: tl.constexpr = 8 // D.high_bits
            high = tl.load(block + D.high_at + v // A_BYTE).to(tl.int32) >> (v % A_BYTE * D.high_bits)
            number = number | ((high & ((1 << D.high_bits) - 1)) << 8)
        elif D.number == "threes":
            number = number | (((word_at(block + D.high_at + v // 4 * 2) >> (v % 4 * 3)) & 7) << 8)
        elif D.number == "nibbles":
            number = number | ((nibble_at(block + D.high_at, v) & 7) << 8)
    return number


@triton.jit
def is_lowered(block, v, D: tl.constexpr):
    """Whether the shift of vector v is negative."""
    if D.number == "threes":
        bit = word_at(block + D.high_at + v // 4 * 2) & 0x8000
    else:
        bit = nibble_at(block + D.high_at, v) & 8
    return bit != 0


@triton.jit
def signs_of(block, i, D: tl.constexpr):
    """int32: the signs of eight values from value 8 i on, a bit each."""
    if D.signs == "bytes":
        found = tl.load(block + D.signs_at + i).to(tl.int32)
    elif D.signs == "numbers":
        found = even(word_at(block + D.index_at + 2 * i) >> 9)
    else:
        first = i % 4 * 7  # two bytes hold the index; LLVM for sm_100 cannot compile all four joined
        address = block + D.signs_at + i // 4 * D.signs_stride + first // 8
        found = even((word_at(address) >> (first % 8)) & 127)
    return found


@triton.jit
def even(index):
    """Seven bits and an eighth that makes the number of ones even."""
    ones = index ^ (index >> 4)
    ones = ones ^ (ones >> 2)
    ones = ones ^ (ones >> 1)
    return index | ((ones & 1) << 7)


@triton.jit
def factor_of(block, group, D: tl.constexpr):
    """float32: what multiplies the entries of groups."""
    if D.scale == "spread":
        bits = nibble_at(block + D.scale_at, 3) | (nibble_at(block + D.scale_at, 7) << 4)
        bits = bits | (nibble_at(block + D.scale_at, 11) << 8) | (nibble_at(block + D.scale_at, 15) << 12)
        d = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        number = (word_at(block + D.scale_at + group // 4 * 2) >> (group % 4 * 3)) & 7
    else:
        d = float16_values(block + D.d_at)
        if D.scale == "nibbles":
            number = nibble_at(block + D.scale_at, group)
        elif D.scale == "threes":
            number = (word_at(block + D.high_at + group * 2) >> 12) & 7
        else:
            number = tl.load(block + D.signs_at + group * D.signs_stride + 3).to(tl.int32) >> 4
    return d * (D.low + D.step * number.to(tl.float32)) * D.half


@triton.jit
def decode_digits(tensors, k, n, N, K, D: tl.constexpr):
    """d * (digit - 1): a byte times 3**(i + 1), its digits of base 3 before place i taken off, holds digit i on top."""
    block = tensors[0] + (n * (K // ELEMENTS) + k // ELEMENTS).to(tl.int64) * D.nbytes
    element = (k % ELEMENTS).to(tl.int32)
    second, last = element - DIGITS, element - LAST_DIGITS
    byte = tl.where(element < DIGITS, element % 32, tl.where(last < 0, 32 + second % 16, 48 + last % 4))
    place = tl.where(element < DIGITS, element // 32, tl.where(last < 0, second // 16, last // 4))
    power = tl.where(place == 0, 1, tl.where(place == 1, 3, tl.where(place == 2, 9, tl.where(place == 3, 27, 81))))
    digit = ((tl.load(block + byte).to(tl.int32) * power) & 255) * 3 >> 8
    return float16_values(block + D.d_at) * (digit - 1).to(tl.float32)
