# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of Quark's weights alone: words of 4-bit integers, bytes of integers, and floats of 8, 6 and 4 bits."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat, float_dtype
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.minifloats import block_index, e4m3_values, e8m0_values, element_values, load_codes
from quantcore_misc.quark.codes import INTEGERS, INTERLEAVE
from quantcore_misc.quark.weight import QuarkWeight

_FLOAT_BITS = {"e4m3": 8, "e2m3": 6, "e2m1": 4}
_PLACES = tuple(INTERLEAVE.index(column) for column in range(8))


class Integers(NamedTuple):
    """How a code is found, and what scales it.

    bits: 8, or 4 for words. signed: two's complement. group: columns that share a scale, 0 for a whole row, or for all
    rows where `shared`. by_rows: codes are [N, K], and words lie along K; else [K, N], words lie along N, and scales
    and zeros are [K / group, N] too.
    interleaved: codes of a word stand as INTERLEAVE says.
    """

    bits: int
    signed: bool
    group: int
    shared: bool
    by_rows: bool
    interleaved: bool


class Floats(NamedTuple):
    """The element, by its bits; rows (0 for all) and columns (0 for all) that share a scale; what a scale is."""

    bits: int
    rows: int
    columns: int
    scales: str


@triton.jit
def decode_integers(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale; tensors are codes, scales and zeros."""
    if D.bits == 8 and D.by_rows:
        code = tl.load(tensors[0] + n * K + k).to(tl.int32)
    elif D.bits == 8:
        code = tl.load(tensors[0] + k * N + n).to(tl.int32)
    elif D.by_rows:
        code = nibble(tensors[0], n, k, K, D)
    else:
        code = nibble(tensors[0], k, n, N, D)
    return shifted_and_scaled(tensors, code, n, k, N, K, D)


@triton.jit
def scale_integers(tensors, codes, n, g, N, K, D: tl.constexpr):
    """The same numbers of codes that are unpacked already."""
    codes = codes.to(tl.int32)
    if D.bits == 4 and D.signed:
        codes = signed(codes)
    zero, scale = zero_and_scale(tensors, n, g * max(D.group, 1), N, K, D)
    return (codes - zero[:, :, None]).to(tl.float32) * scale[:, :, None]


@triton.jit
def shifted_and_scaled(tensors, code, n, k, N, K, D: tl.constexpr):
    zero, scale = zero_and_scale(tensors, n, k, N, K, D)
    return (code - zero).to(tl.float32) * scale


@triton.jit
def zero_and_scale(tensors, n, k, N, K, D: tl.constexpr):
    """int32 and float32 of row n and column k."""
    group = k * 0
    groups = tl.full([], 1, n.dtype)
    if D.group > 0:
        group = k // D.group
        groups = (K // D.group).to(n.dtype)
    row = n
    if D.shared:
        row = n * 0
    if D.by_rows:
        place = row * groups + group
    else:
        place = group * N + row
    if D.bits == 8:
        zero = tl.load(tensors[2] + place).to(tl.int32)
    elif D.by_rows:
        zero = nibble(tensors[2], row * 0 + k * 0, row + k * 0, N, D)
    else:
        zero = nibble(tensors[2], group + n * 0, row + k * 0, N, D)
    return zero, tl.load(tensors[1] + place).to(tl.float32)


@triton.jit
def nibble(words, line, i, length, D: tl.constexpr):
    """int32: code i of a line of words that holds `length` codes."""
    place = i % 8
    if D.interleaved:
        place = place % 2 * 4 + place // 2
    word = tl.load(words + line * (length // 8) + i // 8)
    code = (word >> (place * 4).to(tl.int32)) & 15
    if D.signed:
        code = signed(code)
    return code


@triton.jit
def signed(code):
    """Two's complement of 4 bits as a number."""
    return (code ^ 8) - 8


@triton.jit
def decode_floats(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale; tensors are codes and scales, these as bytes but for floats, and the second scale of "e4m3"."""
    values = element_values(load_codes(tensors[0], k, n, K, D.bits), D.bits)
    return values * float_scale(tensors, n, k, K, D)


@triton.jit
def scale_floats(tensors, codes, n, g, N, K, D: tl.constexpr):
    """The same numbers of codes that are unpacked already."""
    return element_values(codes, D.bits) * float_scale(tensors, n, g * max(D.columns, 1), K, D)[:, :, None]


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
    if weight_format.has_zero:
        return _integers(weight_format)
    return _floats(weight_format) if weight_format.element in _FLOAT_BITS else None


def _integers(weight_format: QuarkWeight) -> Decoder | None:
    bits, by_rows = INTEGERS[weight_format.element].bits, weight_format.strategy != "group"
    group, is_shared = weight_format.group_size, weight_format.strategy == "tensor"
    if bits < 4 or (bits == 4 and is_shared):
        return None
    order = _PLACES if weight_format.is_reordered else range(8)
    along = "k" if by_rows else "n"
    bytes_ = Words(1, 8, "k", transposed=not by_rows, group=group)
    return Decoder(
        name=f"quark {weight_format.element} by {weight_format.strategy} {group or 'whole'}",
        decode=decode_integers,
        constants=Integers(
            bits,
            INTEGERS[weight_format.element].is_signed,
            group,
            is_shared,
            by_rows,
            weight_format.is_reordered,
        ),
        views=(None, None, None),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=bytes_ if bits == 8 else Words(8, 4, along, places(*order), transposed=not by_rows, group=group),
        scale=scale_integers,
    )


def _floats(weight_format: QuarkWeight) -> Decoder:
    bits, columns = _FLOAT_BITS[weight_format.element], weight_format.group_size
    rows = 0 if weight_format.strategy == "tensor" else weight_format.block_rows or 1
    codes = 8 // bits
    words = Words(codes, bits, "k", places(*range(codes)) if codes > 1 else 0, group=columns)
    is_tile = bits != 6 and columns & (columns - 1) == 0
    second = (None,) if weight_format.scale == "e4m3" else ()
    return Decoder(
        name=f"quark {weight_format.element} {rows}x{columns} scales {weight_format.scale}",
        decode=decode_floats,
        constants=Floats(bits, rows, columns, weight_format.scale),
        views=(torch.uint8, None if weight_format.scale == "float" else torch.uint8, *second),
        dtype=float_dtype(weight_format.dtype, "dtype"),
        words=words if is_tile else None,
        scale=scale_floats,
    )
