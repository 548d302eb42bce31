# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of every block type: of one whose codes stand in groups under a scale, derived from its row in `SCALED`.

Those of vectors and of digits of base 3 are in `decode_grids`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import Decoder, WeightFormat, Words, float16_values, float_dtype, places, small_float
from quantcore_misc.gguf import decode_grids, scales
from quantcore_misc.gguf.blocks import SCALED, Scaled
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.gguf.layouts import Plane
from quantcore_misc.gguf.types import GgmlType, block_type

_BYTE = 8
_NO_PLANE = Plane("", 0, 1)


class Block(NamedTuple):
    """One block type. Places are bytes from the start of a block; planes are those of `layouts.Plane`, 0 bits: none.

    zero: of codes. signed: whether codes are signed bytes. tabled: whether codes stand for the signed bytes of
    levels_low and levels_high, eight each, the lowest first. scale: what multiplies d, "": nothing, "planes" (less
    scale_zero; of signed bytes where these have 8 bits), "six_bits", or in place of d "powers" and "small_floats".
    minimum: "" for none, "planes" of the scales' own, from group minimum_from, "six_bits", or "offset".
    """

    elements: int
    nbytes: int
    group: int
    zero: int
    signed: bool
    tabled: bool
    levels_low: int
    levels_high: int
    code_at: int
    code_bits: int
    code_span: int
    high_at: int
    high_bits: int
    high_span: int
    d_at: int
    scale: str
    scale_zero: int
    scale_at: int
    scale_bits: int
    scale_span: int
    scale_high_at: int
    scale_high_bits: int
    scale_high_span: int
    minimum: str
    minimum_at: int
    minimum_from: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """scale * number - minimum of its group; tensors are the rows of blocks alone."""
    block, group = place_of(tensors, k, n, K, D)
    element = k % D.elements
    codes = number_in_planes(
        block, element, D.code_at, D.code_bits, D.code_span, D.high_at, D.high_bits, D.high_span, D
    )
    values = number_of(codes, D) * scale_of(block, group, D)
    if D.minimum != "":
        values = values - minimum_of(block, group, D)
    return values


@triton.jit
def level(tensors, codes, n, g, N, K, D: tl.constexpr):
    """A code's number; under a minimum the value itself."""
    numbers = number_of(codes, D)
    if D.minimum != "":
        block, group = place_of(tensors, g * D.group, n, K, D)
        numbers = numbers * scale_of(block, group, D)[:, :, None] - minimum_of(block, group, D)[:, :, None]
    return numbers


@triton.jit
def factor(tensors, n, g, N, K, D: tl.constexpr):
    """The scale of a group; 1 where levels are values."""
    if D.minimum != "":
        factors = tl.full((n.shape[0], g.shape[1]), 1.0, tl.float32)
    else:
        block, group = place_of(tensors, g * D.group, n, K, D)
        factors = scale_of(block, group, D)
    return factors


@triton.jit
def place_of(tensors, k, n, K, D: tl.constexpr):
    """Where the blocks of columns k begin, and the group within."""
    number = (n * (K // D.elements) + k // D.elements).to(tl.int64)  # bytes may be more than weights
    return tensors[0] + number * D.nbytes, k % D.elements // D.group


@triton.jit
def number_in_planes(
    block,
    i,
    AT: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    HIGH_AT: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    HIGH_SPAN: tl.constexpr,
    D: tl.constexpr,
):
    """int32: number i of a block, whose bits above BITS stand in a plane of their own."""
    number = bits_in_plane(block + AT, i, BITS, SPAN)
    if HIGH_BITS > 0:
        number |= bits_in_plane(block + HIGH_AT, i, HIGH_BITS, HIGH_SPAN) << BITS
    return number


@triton.jit
def bits_in_plane(plane, i, BITS: tl.constexpr, SPAN: tl.constexpr):
    """int32: the bits of number i."""
    CHUNK: tl.constexpr = SPAN * (8 // BITS)
    byte = tl.load(plane + i // CHUNK * SPAN + i % SPAN).to(tl.int32)
    return (byte >> (i % CHUNK // SPAN * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def number_of(codes, D: tl.constexpr):
    """float32 of what codes stand for, before they are scaled."""
    if D.tabled:
        codes = codes.to(tl.int32)
        packed = tl.where(codes < 8, D.levels_low, D.levels_high)
        codes = signed_byte(packed >> (codes % 8 * 8).to(tl.int64))
    elif D.signed:
        codes = signed_byte(codes)
    return codes.to(tl.float32) - D.zero


@triton.jit
def signed_byte(number):
    """int32 of the lowest byte, as a signed one."""
    return ((number.to(tl.int32) & 0xFF) ^ 0x80) - 0x80


@triton.jit
def scale_of(block, group, D: tl.constexpr):
    """float32 scales of groups."""
    if D.scale == "powers":
        scale = half_powers(tl.load(block + D.scale_at + group))
    elif D.scale == "small_floats":
        scale = half_small_floats(tl.load(block + D.scale_at + group))
    else:
        scale = float16_values(block + D.d_at)
        if D.scale == "six_bits":
            scale = scale * six_bits(block + D.scale_at, group, 0).to(tl.float32)
        elif D.scale == "planes":
            scale = scale * (number_of_scale(block, group, D) - D.scale_zero).to(tl.float32)
        else:
            scale = scale + tl.zeros(group.shape, tl.float32)  # one for each group, where a block has more
    return scale


@triton.jit
def minimum_of(block, group, D: tl.constexpr):
    """float32: what is taken from the values of groups."""
    minimum = float16_values(block + D.minimum_at)
    if D.minimum == "six_bits":
        minimum = minimum * six_bits(block + D.scale_at, group, 4).to(tl.float32)
    elif D.minimum == "planes":
        minimum = minimum * number_of_scale(block, group + D.minimum_from, D).to(tl.float32)
    else:
        minimum = -minimum
    return minimum


@triton.jit
def number_of_scale(block, i, D: tl.constexpr):
    """int32: number i of the integers that d multiplies."""
    number = number_in_planes(
        block,
        i,
        D.scale_at,
        D.scale_bits,
        D.scale_span,
        D.scale_high_at,
        D.scale_high_bits,
        D.scale_high_span,
        D,
    )
    if D.scale_bits == 8:
        number = signed_byte(number)
    return number


@triton.jit
def six_bits(packed, group, FIRST: tl.constexpr):
    """int32 of 6 bits in twelve bytes: from byte FIRST the first four, whose upper bits are those of the last four."""
    own = tl.load(packed + FIRST + group % 4).to(tl.int32)
    rest = tl.load(packed + 8 + group % 4).to(tl.int32) >> FIRST  # the minima, whose bytes come next, in high nibbles
    return tl.where(group < 4, own & 63, (rest & 15) | (own >> 6 << 4))


@triton.jit
def half_powers(code):
    """2**(code - 128) of bytes."""
    code = code.to(tl.int32)
    return tl.where(code < 2, 0x200000 << code, (code - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def half_small_floats(code):
    """Half the value of E4M3 bytes without their sign; 127 is 0."""
    values = small_float(code.to(tl.int32) & 0x7F, 7, 3) * 6.646139978924579e35  # 2**(127 - 7 - 1)
    return tl.where(code == 127, 0.0, values)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a block type; None for any other format."""
    if type(weight_format) is not GgufWeight:
        return None
    kind, dtype = block_type(weight_format.type), float_dtype(weight_format.dtype, "dtype")
    dtype = torch.float32 if dtype == torch.float64 else dtype  # values are float32 before they are cast
    name = f"gguf {kind.name}"
    if kind.name in decode_grids.GRIDS:
        return Decoder(name, decode_grids.decode, decode_grids.GRIDS[kind.name], (None, None), dtype)
    if kind.name not in SCALED:
        return Decoder(name, decode_grids.decode_digits, decode_grids.digits(), (None,), dtype)
    block = _block(kind, SCALED[kind.name])
    return Decoder(name, decode, block, (None,), dtype, words=_words(block), level=level, factor=factor)


class _Factors(NamedTuple):
    """How kernels read the scales and minima of blocks; see `Block`."""

    scale: str = ""
    planes: tuple[Plane, ...] = ()
    zero: int = 0
    minimum: str = ""
    minimum_field: str = ""
    minimum_from: int = 0


_FACTORS = {
    scales.HALF: _Factors(),
    scales.HALF_AND_OFFSET: _Factors(minimum="offset", minimum_field="m"),
    scales.NIBBLES: _Factors("planes", scales.NIBBLE_PLANES, 0, "planes", "dmin", 16),
    scales.SIX_BITS: _Factors("six_bits", (Plane("scales", _BYTE, 1),), 0, "six_bits", "dmin"),
    scales.SPLIT_THREE: _Factors("planes", scales.SPLIT_THREE_PLANES, 32),
    scales.SPLIT_FOUR: _Factors("planes", scales.SPLIT_FOUR_PLANES, 32),
    scales.BYTES: _Factors("planes", (Plane("scales", _BYTE, 1),)),
    scales.POWERS: _Factors("powers", (Plane("scales", _BYTE, 1),)),
    scales.SMALL_FLOATS: _Factors("small_floats", (Plane("scales", _BYTE, 1),)),
}


def _block(kind: GgmlType, layout: Scaled) -> Block:
    at, factors = _places_of_fields(kind), _FACTORS[layout.scales]
    code, high = _pair(layout.planes or (Plane("qs", _BYTE, 1),))
    scale, scale_high = _pair(factors.planes)
    levels = [level & 0xFF for level in layout.levels]
    return Block(
        elements=kind.elements,
        nbytes=kind.nbytes,
        group=layout.group,
        zero=layout.zero,
        signed=not layout.planes,
        tabled=bool(levels),
        levels_low=int.from_bytes(levels[:_BYTE], "little", signed=True),
        levels_high=int.from_bytes(levels[_BYTE:], "little", signed=True),
        code_at=at[code.field],
        code_bits=code.bits,
        code_span=code.span,
        high_at=at.get(high.field, 0),
        high_bits=high.bits,
        high_span=high.span,
        d_at=at.get("d", 0),
        scale=factors.scale,
        scale_zero=factors.zero,
        scale_at=at.get(scale.field, 0),
        scale_bits=scale.bits,
        scale_span=scale.span,
        scale_high_at=at.get(scale_high.field, 0),
        scale_high_bits=scale_high.bits,
        scale_high_span=scale_high.span,
        minimum=factors.minimum,
        minimum_at=at.get(factors.minimum_field, 0),
        minimum_from=factors.minimum_from,
    )


def _places_of_fields(kind: GgmlType) -> dict[str, int]:
    """The first byte of each field in a block."""
    found, start = {}, 0
    for field in kind.fields:
        found[field.name] = start
        start += field.nbytes
    return found


def _pair(planes: tuple[Plane, ...]) -> tuple[Plane, Plane]:
    """The planes of low and of high bits, those without bits where there are none."""
    low, high = (*planes, _NO_PLANE, _NO_PLANE)[:2]
    return low, high


def _words(block: Block) -> Words:
    codes = _BYTE // block.code_bits
    return Words(
        codes=codes,
        bits=block.code_bits,
        along="k",
        order=places(*range(codes)),
        group=block.group,
        numbers=codes > 1 and not block.tabled,
        lanes=block.code_span,
        block=block.elements,
        stride=block.nbytes,
        offset=block.code_at,
        high_bits=block.high_bits,
        high_lanes=block.high_span,
        high_offset=block.high_at,
    )
