# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of GPTQ weights of every bit width, layout and order of groups."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat, Words, float_dtype, packing, places, rounded
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.marlin import Marlin
from quantcore_gptq.marlin_decode import marlin_decoder

_MOST_CODES = 16  # that a word's order can say


class Columns(NamedTuple):
    """How a code is found in the words of its row, and which group it belongs to.

    word: bits of one. group: columns of a group, 0 where a row is one; looked_up: the group of each column is stored.
    plane0, plane1, plane2: widths of the bit planes, low first; 0 where codes are one stream.
    """

    bits: int
    word: int
    group: int
    looked_up: bool
    plane0: int
    plane1: int
    plane2: int


@triton.jit
def decode_columns(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale, rounded to D.rounds; tensors are words, zeros, scales, and groups where D.looked_up."""
    code = stream_code(tensors[0], k, n, N, D) if D.plane1 == 0 else planar_code(tensors[0], k, n, N, D)
    if D.looked_up:
        group = tl.load(tensors[3] + k)
    elif D.group == 0:
        group = tl.zeros_like(k)
    else:
        group = k // D.group
    place = group * N + n
    zero, scale = tl.load(tensors[1] + place).to(tl.int32), tl.load(tensors[2] + place).to(tl.float32)
    return rounded((code - zero).to(tl.float32) * scale, D.rounds).to(tl.float32)


@triton.jit
def level_of_code(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero."""
    zero = tl.load(tensors[1] + group_place(tensors, n, g, N, D))
    return codes - zero.to(tl.float32)[:, :, None]


@triton.jit
def scale_of_group(tensors, n, g, N, K, D: tl.constexpr):
    return tl.load(tensors[2] + group_place(tensors, n, g, N, D)).to(tl.float32)


@triton.jit
def group_place(tensors, n, g, N, D: tl.constexpr):
    """Where the zero point and scale of group g stand, or of column g where D.looked_up."""
    group = tl.load(tensors[3] + g) if D.looked_up else g
    return group * N + n


@triton.jit
def stream_code(words, k, n, N, D: tl.constexpr):
    """int32 [BN, BK]: codes of a stream of bits, each from one word, or two where it crosses their border."""
    first = k * D.bits
    row = first // D.word
    shift = first % D.word
    word = load_word(words + row * N + n, D)
    code = (word >> shift.to(word.dtype)).to(tl.int32)
    if D.word % D.bits != 0:
        held = tl.minimum(D.word - shift, D.bits)  # bits of the code in this word
        crosses = held < D.bits
        upper = load_word(words + (row + crosses.to(row.dtype)) * N + n, D).to(tl.int32)
        code = code & ((1 << held) - 1)  # the shift of a signed word fills with its sign
        code = tl.where(crosses, code | (upper << held), code)
    return code & ((1 << D.bits) - 1)


@triton.jit
def planar_code(words, k, n, N, D: tl.constexpr):
    """int32 [BN, BK]: codes from their pieces in the bit planes of each block of D.word codes."""
    row = k // D.word * D.bits
    code = plane_piece(words, row, k % D.word, n, N, D.plane0, D)
    code |= plane_piece(words, row + D.plane0, k % D.word, n, N, D.plane1, D) << D.plane0
    if D.plane2 > 0:
        low: tl.constexpr = D.plane0 + D.plane1
        code |= plane_piece(words, row + low, k % D.word, n, N, D.plane2, D) << low
    return code


@triton.jit
def plane_piece(words, row, place, n, N, WIDTH: tl.constexpr, D: tl.constexpr):
    """int32 [BN, BK]: the bits at some place of a plane that begins in a row."""
    per_word: tl.constexpr = D.word // WIDTH
    word = load_word(words + (row + place // per_word) * N + n, D)
    shift = place % per_word * WIDTH
    return (word >> shift.to(word.dtype)).to(tl.int32) & ((1 << WIDTH) - 1)


@triton.jit
def load_word(pointers, D: tl.constexpr):
    word = tl.load(pointers)
    if D.word < 32:
        word = word.to(tl.int32)
    return word


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a format with scales in float32, bfloat16 or float16; None for any other."""
    if isinstance(weight_format, Marlin):
        return marlin_decoder(weight_format)
    if not isinstance(weight_format, Gptq):
        return None
    dtype = float_dtype(weight_format.scale_dtype, "scale_dtype")
    if dtype not in TRITON_DTYPES:
        return None
    layout, looked_up = weight_format.layout, weight_format.g_idx == "any"
    group = max(weight_format.group_size, 0)
    first, second, third = (*(packing.PLANES.get(layout.bits, ()) if weight_format.planar else ()), 0, 0, 0)[:3]
    return Decoder(
        name=f"gptq {layout.bits} bits group {group or 'whole'}{' looked up' if looked_up else ''}",
        decode=decode_columns,
        constants=Columns(layout.bits, layout.word_bits, group, looked_up, first, second, third),
        views=(None, None, None, None) if looked_up else (None, None, None),
        dtype=dtype,
        words=_words(layout.bits, layout.word_bits, 1 if looked_up else group, is_plain=first == 0),
        level=level_of_code,
        factor=scale_of_group,
        rounds=dtype,
    )


def _words(bits: int, word: int, group: int, is_plain: bool) -> Words | None:
    """Words of 32 bits that hold whole codes; None for others, which are gathered."""
    if word != 32 or word % bits or not is_plain:
        return None
    codes = word // bits
    return (
        Words(codes, bits, "k", places(*range(codes)), transposed=True, group=group, numbers=True)
        if codes <= _MOST_CODES
        else None
    )
