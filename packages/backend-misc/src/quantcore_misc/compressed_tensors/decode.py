# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoders of weights alone: packed and plain integers, and floats of 8, 6 and 4 bits."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.minifloats import e4m3_values, e8m0_values, element_values, load_codes
from quantcore.kernels.triton.rounding import TRITON_DTYPES, rounded
from quantcore_misc.compressed_tensors.packed import PackedWeight, SmallFloatWeight
from quantcore_misc.compressed_tensors.plain import FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.compressed_tensors.weight import CompressedWeight

_MOST_CODES = 16  # that the order of a word can say
_LEAST_RUN = 8  # neighbouring columns of a tile with one scale


class Integers(NamedTuple):
    """How an integer is found, and what scales it.

    rows, columns: of a block, 0 for all. words: codes are in 32-bit words, whole_codes in each, or 0 where they cross
    borders; else one in an int8. zeros: "none", "plain" int8 [grid], "packed" along the rows. looked_up: the group of
    each column is stored.
    """

    bits: int
    rows: int
    columns: int
    words: bool
    whole_codes: int
    zeros: str
    looked_up: bool


class Floats(NamedTuple):
    """The element, by its bits; rows and columns of a block, 0 for all; what its scale is."""

    bits: int
    rows: int
    columns: int
    scales: str


@triton.jit
def decode_integers(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale, rounded to D.rounds; tensors are codes, scales, zeros and groups, as far as there are."""
    if D.words:
        code = packed_code(tensors[0], n, 1, K, k, False, D)
    else:
        code = tl.load(tensors[0] + n * K + k).to(tl.int32)
    return apply_scale(tensors, code, n, k, k, N, K, D)


@triton.jit
def level_of_integer(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero."""
    zero, _ = zero_and_scale(tensors, n, g if D.looked_up else g * max(D.columns, 1), N, K, D)
    if D.words:
        zero += 1 << (D.bits - 1)
    return codes.to(tl.float32) - zero.to(tl.float32)[:, :, None]


@triton.jit
def scale_of_integers(tensors, n, g, N, K, D: tl.constexpr):
    _, scale = zero_and_scale(tensors, n, g if D.looked_up else g * max(D.columns, 1), N, K, D)
    return scale


@triton.jit
def apply_scale(tensors, code, n, k, column, N, K, D: tl.constexpr):
    zero, scale = zero_and_scale(tensors, n, k, N, K, D)
    return rounded((code - zero).to(tl.float32) * scale, D.rounds).to(tl.float32)


@triton.jit
def zero_and_scale(tensors, n, k, N, K, D: tl.constexpr):
    """int32 and float32 of the block of row n and column k."""
    row, column, columns = block_place(n, k, K, D)
    if D.looked_up:
        column = tl.load(tensors[3 if D.zeros != "none" else 2] + k)
    place = row * columns + column
    scale = tl.load(tensors[1] + place).to(tl.float32)
    if D.zeros == "plain":
        zero = tl.load(tensors[2] + place).to(tl.int32)
    elif D.zeros == "packed":
        rows = N
        if D.rows == 0:
            rows = N * 0 + 1
        zero = packed_code(tensors[2], column, columns, rows, row, True, D)
    else:
        zero = tl.zeros_like(place).to(tl.int32)
    return zero, scale


@triton.jit
def packed_code(words, line, stride, length, i, ACROSS: tl.constexpr, D: tl.constexpr):
    """int32: code i of a line of words: a row of them, or ACROSS them a column, of words `stride` apart."""
    if D.whole_codes > 0:
        per_line = (length + D.whole_codes - 1) // D.whole_codes
        word = i // D.whole_codes
        shift = i % D.whole_codes * D.bits
    else:
        per_line = (length * D.bits + 31) // 32
        word = i * D.bits // 32
        shift = i * D.bits % 32
    if ACROSS:
        place = word * stride + line
    else:
        place = line * per_line + word
    code = (tl.load(words + place) >> shift.to(tl.int32)).to(tl.int32)
    if D.whole_codes == 0:
        held = tl.minimum(32 - shift, D.bits).to(tl.int32)  # bits of the code in this word
        crosses = held < D.bits
        upper = tl.load(words + place + crosses.to(place.dtype) * stride)
        code = code & ((1 << held) - 1)  # the shift of a signed word fills with its sign
        code = tl.where(crosses, code | (upper << held), code)
    return (code & ((1 << D.bits) - 1)) - (1 << (D.bits - 1))


@triton.jit
def decode_floats(tensors, k, n, N, K, D: tl.constexpr):
    """code * scale; tensors are codes and scales as bytes, and the global scale of nvfp4."""
    values = element_values(load_codes(tensors[0], k, n, K, D.bits), D.bits)
    product = values * float_scale(tensors, n, k, K, D)
    if D.rounds is not None:
        product = rounded(product, D.rounds).to(tl.float32)
    return product


@triton.jit
def level_of_float(tensors, codes, n, g, N, K, D: tl.constexpr):
    return element_values(codes, D.bits)


@triton.jit
def scale_of_floats(tensors, n, g, N, K, D: tl.constexpr):
    return float_scale(tensors, n, g * max(D.columns, 1), K, D)


@triton.jit
def float_scale(tensors, n, k, K, D: tl.constexpr):
    """float32 of the block of row n and column k."""
    row, column, columns = block_place(n, k, K, D)
    stored = tl.load(tensors[1] + row * columns + column)
    if D.scales == "e8m0":
        scale = e8m0_values(stored)
    elif D.scales == "nvfp4":
        scale = tl.math.div_rn(e4m3_values(stored), tl.load(tensors[2]) + tl.zeros_like(stored).to(tl.float32))
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def block_place(n, k, K, D: tl.constexpr):
    """Row and column of a block in the grid, and the columns of the grid."""
    row, column = n * 0, k * 0
    columns = tl.full([], 1, n.dtype)
    if D.rows > 0:
        row = n // D.rows
    if D.columns > 0:
        column = k // D.columns
        columns = columns * (K + D.columns - 1) // D.columns
    return row, column, columns


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a weight, however its layer rounds activations; None for any other format."""
    if not isinstance(weight_format, CompressedWeight) or weight_format.scaling is None:
        return None
    if weight_format.scaling.scales == "float" and weight_format.torch_dtype not in TRITON_DTYPES:
        return None
    if isinstance(weight_format, PackedWeight | IntegerWeight):
        return _integers(weight_format, weight_format.scaling)
    is_float = isinstance(weight_format, FloatWeight | SmallFloatWeight)
    return _floats(weight_format, weight_format.scaling) if is_float else None


def _integers(weight_format: CompressedWeight, scaling: Scaling) -> Decoder:
    packed = weight_format if isinstance(weight_format, PackedWeight) else None
    whole = 0
    if packed is not None and (packed.is_padded or 32 % scaling.bits == 0):
        whole = 32 // scaling.bits
    zeros = "none"
    if weight_format.has_zero:
        zeros = "plain" if packed is None or packed.plain_zero else "packed"
    looked_up = packed is not None and packed.has_index
    words = Words(1, 8, "k", group=scaling.columns)
    if packed is not None:
        words = Words(
            whole, scaling.bits, "k", places(*range(whole)), group=1 if looked_up else scaling.columns, numbers=True
        )
    can_tile = _is_tile(scaling) and (packed is None or (32 % scaling.bits == 0 and whole <= _MOST_CODES))
    return Decoder(
        name=f"{type(weight_format).__name__} {scaling.element} {scaling.rows}x{scaling.columns} zeros {zeros}",
        decode=decode_integers,
        constants=Integers(scaling.bits, scaling.rows, scaling.columns, packed is not None, whole, zeros, looked_up),
        views=(None,) * (2 + (zeros != "none") + looked_up),
        dtype=weight_format.torch_dtype,
        words=words if can_tile else None,
        level=level_of_integer,
        factor=scale_of_integers,
        rounds=weight_format.torch_dtype,
    )


def _floats(weight_format: CompressedWeight, scaling: Scaling) -> Decoder:
    is_plain = scaling.scales == "float"
    dtype = weight_format.torch_dtype if is_plain else torch.bfloat16
    codes = 8 // scaling.bits
    words = Words(codes, scaling.bits, "k", places(*range(codes)) if codes > 1 else 0, group=scaling.columns)
    global_scale = (None,) if scaling.scales == "nvfp4" else ()
    return Decoder(
        name=f"{scaling.element} {scaling.rows}x{scaling.columns} scales {scaling.scales}",
        decode=decode_floats,
        constants=Floats(scaling.bits, scaling.rows, scaling.columns, scaling.scales),
        views=(torch.uint8, None if is_plain else torch.uint8, *global_scale),
        dtype=dtype,
        words=words if scaling.bits != 6 and _is_tile(scaling) else None,
        level=level_of_float,
        factor=scale_of_floats,
        rounds=dtype if is_plain else None,
    )


def _is_tile(scaling: Scaling) -> bool:
    """Whether so many columns share a scale that a tile loads fewer scales than words."""
    return scaling.columns % _LEAST_RUN == 0
