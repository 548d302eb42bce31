# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of Quark's weights alone: integers of 2 to 8 bits, and floats of 8, 6 and 4 bits."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat, float_dtype
from quantcore.formats.minifloat import minifloat
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.minifloats import (
    block_index,
    e4m3_values,
    e8m0_values,
    element_values,
    load_codes,
    small_float,
)
from quantcore_misc.quark.codes import INTEGERS, layout_of
from quantcore_misc.quark.weight import QuarkWeight

_LEAST_RUN = 8  # neighbouring columns of a tile with one scale: with fewer, it loads more scales than words


class Integers(NamedTuple):
    """How a code is found, and what scales it.

    bits: of a code. codes: in a number that is stored, 0 where eight of 3 bits lie in three bytes. signed: two's
    complement. group: columns that share a scale: codes are [K, N] then, packed along N, and so are zeros
    [K / group, N], beside scales of that shape. 0: codes are [N, K], packed along K, and scales and zeros [N], or one
    of each where `shared`.
    """

    bits: int
    codes: int
    signed: bool
    group: int
    shared: bool


class Floats(NamedTuple):
    """The element and its bits; rows (0 for all) and columns (0 for all) that share a scale; what a scale is."""

    element: str
    bits: int
    rows: int
    columns: int
    scales: str


@triton.jit
def decode_integers(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale; tensors are codes, scales and zeros."""
    if D.group > 0:
        code = code_of(tensors[0], k.to(n.dtype), n, N, D)
    else:
        code = code_of(tensors[0], n, k, K, D)
    zero, scale = zero_and_scale(tensors, n, k, N, D)
    return (code - zero).to(tl.float32) * scale


@triton.jit
def level_of_integer(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero."""
    if D.codes > 1 and D.signed:
        codes = signed(codes, D)
    zero, _ = zero_and_scale(tensors, n, g * max(D.group, 1), N, D)
    return codes.to(tl.float32) - zero.to(tl.float32)[:, :, None]


@triton.jit
def scale_of_integers(tensors, n, g, N, K, D: tl.constexpr):
    _, scale = zero_and_scale(tensors, n, g * max(D.group, 1), N, D)
    return scale


@triton.jit
def zero_and_scale(tensors, n, k, N, D: tl.constexpr):
    """int32 and float32 of row n and column k."""
    line, row = (k * 0).to(n.dtype), n
    if D.group > 0:
        line = (k // D.group).to(n.dtype)
    if D.shared:
        row = n * 0
        zero = tl.load(tensors[2] + (line + row)).to(tl.int32)
    else:
        zero = code_of(tensors[2], line, row, N, D)
    return zero, tl.load(tensors[1] + (line * N + row)).to(tl.float32)


@triton.jit
def code_of(stored, line, i, length, D: tl.constexpr):
    """int32: code i of a line of `length` codes."""
    if D.codes == 1:
        code = tl.load(stored + (line * length + i)).to(tl.int32)
    else:
        if D.codes == 0:
            code = code_of_three_bits(stored, line, i, length)
        else:
            word = tl.load(stored + (line * (length // D.codes) + i // D.codes)).to(tl.int32)
            place = (D.words_order >> (4 * (i % D.codes)).to(tl.int64)) & 0xF
            code = (word >> (place * D.bits).to(tl.int32)) & ((1 << D.bits) - 1)
        if D.signed:
            code = signed(code, D)
    return code


@triton.jit
def code_of_three_bits(stored, line, i, length):
    """The bits of code i of a line of bytes, of which three hold eight codes, the first in the lowest bits."""
    place = line * (length // 8 * 3) + i * 3 // 8
    shift = (i * 3 % 8).to(tl.int32)
    crosses = shift > 5
    low = tl.load(stored + place).to(tl.int32)
    high = tl.load(stored + (place + crosses.to(place.dtype))).to(tl.int32)
    return ((low | (high << 8)) >> shift) & 7


@triton.jit
def signed(code, D: tl.constexpr):
    """Two's complement of D.bits bits as a number."""
    return (code ^ (1 << (D.bits - 1))) - (1 << (D.bits - 1))


@triton.jit
def decode_floats(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale; tensors are codes and scales, these as bytes but for floats, and the second scale of "e4m3"."""
    values = values_of(load_codes(tensors[0], k, n, K, D.bits), D)
    return values * float_scale(tensors, n, k, K, D)


@triton.jit
def level_of_float(tensors, codes, n, g, N, K, D: tl.constexpr):
    return values_of(codes, D)


@triton.jit
def scale_of_floats(tensors, n, g, N, K, D: tl.constexpr):
    return float_scale(tensors, n, g * max(D.columns, 1), K, D)


@triton.jit
def values_of(codes, D: tl.constexpr):
    """float32 of codes of the element, integers."""
    if D.element == "e5m2":
        values = e5m2_values(codes)
    elif D.element == "e3m2":
        values = e3m2_values(codes)
    else:
        values = element_values(codes, D.bits)
    return values


@triton.jit
def e5m2_values(code):
    """float32 of E5M2 codes, which are the upper bytes of float16."""
    return (code.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e3m2_values(code):
    """float32 of E3M2 codes, integers."""
    return small_float(code.to(tl.int32), 5, 2) * 2.1267647932558654e37  # 2**(127 - 3)


@triton.jit
def float_scale(tensors, n, k, K, D: tl.constexpr):
    """float32 of row n and column k."""
    stored = tl.load(tensors[1] + block_index(n, k, K, D.rows, D.columns))
    if D.scales == "e8m0":
        scale = e8m0_values(stored)
    elif D.scales == "e5m3":
        scale = e5m3_values(stored)
    elif D.scales == "e4m3":
        scale = e4m3_values(stored) * tl.load(tensors[2])
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def e5m3_values(code):
    """float32 of unsigned E5M3 codes, integers."""
    code = code.to(tl.int32) & 0xFF
    normal = ((code << 20) + (112 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 7.62939453125e-06, normal)  # 2**-17, the least subnormal


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a weight, however its layer rounds activations; None for any other format."""
    if type(weight_format) is not QuarkWeight:
        return None
    return _integers(weight_format) if weight_format.has_zero else _floats(weight_format)


def _integers(weight_format: QuarkWeight) -> Decoder:
    element, group = INTEGERS[weight_format.element], weight_format.group_size
    layout, is_shared = layout_of(weight_format.element, weight_format.is_reordered), weight_format.strategy == "tensor"
    codes = 1 if layout is None else layout.codes if layout.words == 1 else 0
    return Decoder(
        name=f"quark {weight_format.element} by {weight_format.strategy} {group or 'whole'}",
        decode=decode_integers,
        constants=Integers(element.bits, codes, element.is_signed, group, is_shared),
        views=(None, None, None),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=_words(weight_format),
        level=level_of_integer,
        factor=scale_of_integers,
    )


def _words(weight_format: QuarkWeight) -> Words | None:
    """Words of whole codes, as the layout of the element says; None where codes cross the borders of bytes, and for
    codes in a word each, which would fill tiles with zeros.
    """
    element, group = INTEGERS[weight_format.element], weight_format.group_size
    layout = layout_of(weight_format.element, weight_format.is_reordered)
    if layout is None:
        is_byte = element.dtype.itemsize == 1
        return Words(1, 8, "k", transposed=group > 0, group=group) if is_byte else None
    if layout.words > 1:
        return None
    shifts = {piece.code: piece.shift for piece in layout.pieces}
    order = places(*(shifts[code] // layout.bits for code in range(layout.codes)))
    return Words(layout.codes, layout.bits, "n" if group else "k", order, transposed=group > 0, group=group)


def _floats(weight_format: QuarkWeight) -> Decoder:
    element, columns = weight_format.element, weight_format.group_size
    bits = minifloat(element).bits
    rows = 0 if weight_format.strategy == "tensor" else weight_format.block_rows or 1
    codes = 8 // bits
    words = Words(codes, bits, "k", places(*range(codes)) if codes > 1 else 0, group=columns)
    second = (None,) if weight_format.scale == "e4m3" else ()
    return Decoder(
        name=f"quark {element} {rows}x{columns} scales {weight_format.scale}",
        decode=decode_floats,
        constants=Floats(element, bits, rows, columns, weight_format.scale),
        views=(torch.uint8, None if weight_format.scale == "float" else torch.uint8, *second),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=words if bits != 6 and columns % _LEAST_RUN == 0 else None,
        level=level_of_float,
        factor=scale_of_floats,
    )
