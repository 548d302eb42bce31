# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of every `Scaled` format, derived from its fields."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.formats.base import WeightFormat
from quantcore.formats.elements import Integer
from quantcore.formats.grid_layer import GridLayer
from quantcore.formats.scaled import Scaled
from quantcore.kernels.triton.decoder import Decoder, Words, places
from quantcore.kernels.triton.minifloats import minifloat_values
from quantcore.kernels.triton.rounding import TRITON_DTYPES, rounded

_LEAST_RUN = 8  # neighbouring columns of a tile with one scale: with fewer, it loads more scales than words
_MOST_CODES = 16  # that the order of a word can say
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Storage(NamedTuple):
    """What a `Scaled` format says of its tensors.

    element: "signed", "unsigned" (less bias), or a minifloat. word: bits of a word. whole: codes in a word, 0 where
    they cross words; order: their places, as `places` writes them. along, transposed: as of `Codes`. rows, columns: of
    a block, 0 for all. scale: the kind of scales, under an outer one that, divided by outer_steps, "multiplies",
    "divides", or is "". zero: "",
    "plain" or "packed" in code units, "+" or "-" in units of values. zero_at, outer_at, index_at: which operand.
    scale_turned, zero_turned: stored [blocks across, blocks down]. looked_up: columns' groups are stored.
    """

    element: str
    bits: int
    bias: int
    word: int
    whole: int
    order: int
    along: str
    transposed: bool
    rows: int
    columns: int
    scale: str
    scale_turned: bool
    outer: str
    outer_steps: float
    outer_at: int
    zero: str
    zero_turned: bool
    looked_up: bool
    index_at: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """The weight's values; tensors are codes, scales, and what else is stored, in the order of the format."""
    numbers = number_of(stored_code(tensors[0], k, n, N, K, D), D)
    row, column = block_place(tensors, n, k, D)
    scale = scale_at(tensors, row, column, N, K, D)
    if D.zero == "":
        values = numbers * scale
    else:
        zero = zero_at(tensors, row, column, N, K, D)
        if D.zero == "+" or D.zero == "-":
            values = shifted(numbers * scale, zero, D)
        else:
            values = (numbers - zero) * scale
    if D.rounds is not None:
        values = rounded(values, D.rounds).to(tl.float32)
    return values


@triton.jit
def level(tensors, codes, n, g, N, K, D: tl.constexpr):
    """A code's number less the zero; under an offset in units of values, the value itself."""
    numbers = number_of(codes, D)
    if D.zero != "":
        row, column = group_place(tensors, n, g, D)
        zero = zero_at(tensors, row, column, N, K, D)[:, :, None]
        if D.zero == "+" or D.zero == "-":
            numbers = shifted(numbers * scale_at(tensors, row, column, N, K, D)[:, :, None], zero, D)
        else:
            numbers -= zero
    return numbers


@triton.jit
def factor(tensors, n, g, N, K, D: tl.constexpr):
    """The scale of a group; 1 where levels are values."""
    row, column = group_place(tensors, n, g, D)
    scale = scale_at(tensors, row, column, N, K, D)
    if D.zero == "+" or D.zero == "-":
        scale = tl.full(scale.shape, 1.0, tl.float32)
    return scale


@triton.jit
def shifted(products, zero, D: tl.constexpr):
    """code * scale plus or minus an offset, each rounded where the format's arithmetic is not in float32."""
    if D.rounds is not None:
        products = rounded(products, D.rounds).to(tl.float32)
    if D.zero == "+":
        values = products + zero
    else:
        values = products - zero
    if D.rounds is not None:
        values = rounded(values, D.rounds).to(tl.float32)
    return values


@triton.jit
def number_of(code, D: tl.constexpr):
    """float32 of the bits of codes, or of integers that are stored one an element."""
    if D.element == "unsigned":
        numbers = code.to(tl.float32) - D.bias
    elif D.element == "signed":
        if D.whole != 1:
            code = (code.to(tl.int32) ^ (1 << (D.bits - 1))) - (1 << (D.bits - 1))
        numbers = code.to(tl.float32)
    else:
        numbers = minifloat_values(code, D.element)
    return numbers


@triton.jit
def stored_code(words, k, n, N, K, D: tl.constexpr):
    """The code of row n and column k, as `level` gets it."""
    if D.along == "k":
        code = code_on_line(words, n, k.to(n.dtype), N, K, D.transposed, D)
    elif D.along == "n":
        code = code_on_line(words, k.to(n.dtype), n, K, N, not D.transposed, D)
    else:
        step = (N + D.whole - 1) // D.whole
        if D.transposed:
            place = k.to(n.dtype) * step + n % step
        else:
            place = n % step * K + k
        code = code_of_word(tl.load(words + place), n // step, D)
    return code


@triton.jit
def code_on_line(words, line, i, lines, length, ACROSS: tl.constexpr, D: tl.constexpr):
    """Code i of a line of `length`: the words of a line lie side by side, or ACROSS the lines."""
    if D.whole > 0:
        per_line = (length + D.whole - 1) // D.whole
        word = i // D.whole
    else:
        per_line = (length * D.bits + D.word - 1) // D.word
        word = i * D.bits // D.word
    if ACROSS:
        place, stride = word * lines + line, lines
    else:
        place, stride = line * per_line + word, 1
    if D.whole == 1:
        code = tl.load(words + place)
    elif D.whole > 0:
        code = code_of_word(tl.load(words + place), i % D.whole, D)
    else:
        shift = (i * D.bits % D.word).to(tl.int32)
        held = tl.minimum(D.word - shift, D.bits)  # bits of the code in this word; a signed word fills with its sign
        crosses = held < D.bits
        lower = (tl.load(words + place).to(tl.int32) >> shift) & ((1 << held) - 1)
        upper = tl.load(words + place + crosses.to(place.dtype) * stride).to(tl.int32)
        code = tl.where(crosses, lower | (upper << held), lower) & ((1 << D.bits) - 1)
    return code


@triton.jit
def code_of_word(word, i, D: tl.constexpr):
    """int32: code i of a word that holds whole codes."""
    place = (D.order >> (4 * i).to(tl.int64)) & 0xF
    if D.whole > 16:  # more than an order says: the first in the lowest bits
        place = i
    return (word.to(tl.int32) >> (place * D.bits).to(tl.int32)) & ((1 << D.bits) - 1)


@triton.jit
def block_place(tensors, n, k, D: tl.constexpr):
    """Row and column in the grid of the block of row n and column k."""
    row, column = n * 0, (k * 0).to(n.dtype)
    if D.rows > 0:
        row = n // D.rows
    if D.columns > 0:
        column = (k // D.columns).to(n.dtype)
    if D.looked_up:
        column = tl.load(tensors[D.index_at] + k).to(n.dtype)
    return row, column


@triton.jit
def group_place(tensors, n, g, D: tl.constexpr):
    """As `block_place`, of the groups g of the columns, or where these are looked up, of columns."""
    if D.looked_up:
        k = g
    else:
        k = g * max(D.columns, 1)
    return block_place(tensors, n, k, D)


@triton.jit
def grid_index(row, column, N, K, TURNED: tl.constexpr, D: tl.constexpr):
    """Where the number of a block stands."""
    down, across = tl.full([], 1, row.dtype), tl.full([], 1, row.dtype)
    if D.rows > 0:
        down = down * (N + D.rows - 1) // D.rows
    if D.columns > 0:
        across = across * (K + D.columns - 1) // D.columns
    if TURNED:
        place = column * down + row
    else:
        place = row * across + column
    return place


@triton.jit
def scale_at(tensors, row, column, N, K, D: tl.constexpr):
    """float32 scales of blocks."""
    stored = tl.load(tensors[1] + grid_index(row, column, N, K, D.scale_turned, D))
    if D.scale == "float":
        scale = stored.to(tl.float32)
    else:
        scale = minifloat_values(stored, D.scale)
    if D.outer != "":
        whole = tl.load(tensors[D.outer_at]).to(tl.float32) + tl.zeros_like(scale)
        if D.outer_steps != 1.0:
            whole = tl.math.div_rn(whole, tl.full(scale.shape, D.outer_steps, tl.float32))
        if D.outer == "multiplies":
            scale = scale * whole
        else:
            scale = tl.math.div_rn(scale, whole)
    return scale


@triton.jit
def zero_at(tensors, row, column, N, K, D: tl.constexpr):
    """float32 zeros or offsets of blocks."""
    if D.zero == "packed":
        down, across = tl.full([], 1, row.dtype), tl.full([], 1, row.dtype)
        if D.rows > 0:
            down = down * (N + D.rows - 1) // D.rows
        if D.columns > 0:
            across = across * (K + D.columns - 1) // D.columns
        code = code_on_line(tensors[2], column, row, across, down, not D.zero_turned, D)
        zero = number_of(code, D)
    else:
        zero = tl.load(tensors[2] + grid_index(row, column, N, K, D.zero_turned, D)).to(tl.float32)
    return zero


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a `Scaled` format's weight; None for other formats, and for codes that no `Codes` describes."""
    if isinstance(weight_format, GridLayer) and weight_format.is_plain_grid:
        weight_format = weight_format.grid_format
    if not isinstance(weight_format, Scaled) or not weight_format.has_decoder or weight_format.has_own_layout:
        return None
    if not _is_served(weight_format):
        return None
    stored = _storage(weight_format)
    is_stored_math = weight_format.math == "stored" and weight_format.scale.is_float
    return Decoder(
        name=f"{type(weight_format).__name__} {weight_format.element!r} {stored.rows}x{stored.columns} {stored.scale}",
        decode=decode,
        constants=stored,
        views=_views(weight_format),
        dtype=weight_format.own_dtype,
        words=_words(weight_format, stored),
        level=level,
        factor=factor,
        rounds=weight_format.scale.torch_dtype if is_stored_math else None,
    )


def _is_served(weight_format: Scaled) -> bool:
    """Whether the functions above read such tensors."""
    layout, scale, zero = weight_format.layout, weight_format.scale, weight_format.zero
    floats = [stored.torch_dtype for stored in (scale, zero) if stored and stored.torch_dtype.itemsize > 1]
    are_read = all(dtype in TRITON_DTYPES or not dtype.is_floating_point for dtype in floats)
    packs_apart = layout.along == "apart" and zero is not None and zero.is_packed
    return are_read and layout.packing != "planar" and layout.word_bits <= 32 and not packs_apart


def _storage(weight_format: Scaled) -> Storage:
    element, layout, zero, outer = (getattr(weight_format, name) for name in ("element", "layout", "zero", "outer"))
    is_integer, whole = isinstance(element, Integer), layout.whole_codes(element.bits)
    rows, columns = weight_format.block
    is_single = layout.packing == "single" and element.bits < 8
    kind = "" if zero is None else "packed" if zero.is_packed else "plain"
    if zero is not None and zero.in_values:
        kind = "-" if zero.is_subtracted else "+"
    outer_at = 2 + (zero is not None)
    return Storage(
        element=("signed" if element.is_signed else "unsigned") if is_integer else element.name,
        bits=element.bits,
        bias=0 if not is_integer or element.is_signed or is_single else element.bias,
        word=layout.word_bits,
        whole=whole,
        order=places(*(layout.order or range(whole))) if 1 < whole <= _MOST_CODES else 0,
        along=layout.along,
        transposed=layout.transposed,
        rows=rows,
        columns=columns,
        scale=weight_format.scale.kind_name,
        scale_turned=weight_format.scale.transposed and weight_format.scale.rank == 2,
        outer="" if outer is None else "divides" if outer.divides else "multiplies",
        outer_steps=1.0 if outer is None else outer.steps,
        outer_at=outer_at,
        zero=kind,
        zero_turned=zero is not None and zero.transposed and zero.rank == 2,
        looked_up=weight_format.index is not None,
        index_at=outer_at + (outer is not None),
    )


def _views(weight_format: Scaled) -> tuple[torch.dtype | None, ...]:
    """Words as integers; scales and zeros as they are where these are floats."""
    layout, element, scale = weight_format.layout, weight_format.element, weight_format.scale
    is_signed = isinstance(element, Integer) and element.is_signed and layout.packing == "single"
    size = layout.torch_dtype.itemsize
    words = _SIGNED[size] if is_signed or size > 1 else torch.uint8
    rest = (weight_format.zero, weight_format.outer, weight_format.index)
    zero = weight_format.zero
    zero_view = words if zero is not None and zero.is_packed else None
    others = [zero_view if part is zero and zero is not None else None for part in rest if part is not None]
    return (words, None if scale.is_float else torch.uint8, *others)


def _words(weight_format: Scaled, stored: Storage) -> Words | None:
    """Where the skeletons find codes themselves; None where they cannot split words, or load too many scales."""
    layout, columns = weight_format.layout, stored.columns
    is_run = columns % _LEAST_RUN == 0 or stored.looked_up
    is_split = 1 < stored.whole <= _MOST_CODES and stored.whole & (stored.whole - 1) == 0
    is_word = is_split or (stored.whole == 1 and layout.word_bits == 8)
    if not is_run or not is_word:
        return None
    numbers = stored.whole > 1 and stored.element == "unsigned"
    order, bits = (stored.order, stored.bits) if stored.whole > 1 else (0, 8)
    group = 1 if stored.looked_up else columns
    along = layout.along if stored.whole > 1 else "k"
    return Words(stored.whole, bits, along, order, transposed=layout.transposed, group=group, numbers=numbers)
