# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of codes packed over the rows of a grouped matrix, under a scale and a zero for each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import Decoder, Words, places, rounded
from quantcore_hqq.packing import Packing


class Groups(NamedTuple):
    """The matrix of codes and its packing. group: values in a group; 0 where the matrix is the weight's own [N, K].

    axis: 1 where each row has a scale, 0 where each column has one, -1 where one spans all. halvings: how often a group
    may be halved, as long as it does not divide the columns.
    """

    group: int
    axis: int
    bits: int
    codes_per_word: int
    halvings: int


@triton.jit
def decode_groups(tensors, k, n, N, K, D: tl.constexpr):
    """(code - zero) * scale, each step rounded to D.rounds; tensors are words, scale and zero."""
    HALVINGS: tl.constexpr = D.halvings  # what static_range is given must be a constexpr, not an int
    rows = tl.full([], N, n.dtype)
    columns = tl.full([], K, n.dtype)
    row, column = n, k
    if D.group > 0:
        element, size = n * K + k, tl.full([], D.group, n.dtype)
        for _ in tl.static_range(HALVINGS):
            size = tl.where(columns % size == 0, size, size // 2)
        if D.axis == 1:
            rows, columns = rows * columns // size, size
        else:
            rows, columns = size, rows * columns // size
        row, column = element // columns, element % columns
    step = (rows + D.codes_per_word - 1) // D.codes_per_word  # word [i, c] holds the codes of rows i, i + step, ...
    word = tl.load(tensors[0] + (row % step) * columns + column).to(tl.int32)
    shift = (D.codes_per_word - 1 - row // step) * D.bits
    code = (word >> shift.to(tl.int32)) & ((1 << D.bits) - 1)
    group = row if D.axis == 1 else column
    if D.axis == -1:
        group = tl.full([], 0, n.dtype)
    scale = tl.load(tensors[1] + group).to(tl.float32)
    zero = tl.load(tensors[2] + group).to(tl.float32)
    return rounded(difference(code, zero, D) * scale, D.rounds).to(tl.float32)


@triton.jit
def level_of_code(tensors, codes, n, g, N, K, D: tl.constexpr):
    """code - zero, rounded to D.rounds, on axis 1."""
    zero = tl.load(tensors[2] + group_place(n, g, K, D)).to(tl.float32)
    return difference(codes, zero[:, :, None], D)


@triton.jit
def scale_of_group(tensors, n, g, N, K, D: tl.constexpr):
    return tl.load(tensors[1] + group_place(n, g, K, D)).to(tl.float32)


@triton.jit
def group_place(n, g, K, D: tl.constexpr):
    """Where group g of row n stands on axis 1; D.group divides K."""
    place = n + g
    if D.group > 0:
        place = n * (K // D.group) + g
    return place


@triton.jit
def difference(codes, zero, D: tl.constexpr):
    return rounded(codes.to(tl.float32) - zero, D.rounds).to(tl.float32)


def grouped_decoder(
    method: str, packing: Packing, axis: int, length: int, dtype: torch.dtype, halvings: int = 0
) -> Decoder:
    """The decoder of words, scales and zeros, in this order, whose steps are rounded to dtype.

    axis, length, halvings: as `Groups` has them.
    """
    return Decoder(
        name=f"{method} {packing.bits} bits axis {axis} group {length or 'whole'}",
        decode=decode_groups,
        constants=Groups(length, axis, packing.bits, packing.codes_per_word, halvings),
        views=(packing.word_dtype, None, None),
        dtype=dtype,
        words=_words(packing, length) if axis == 1 else None,
        level=level_of_code,
        factor=scale_of_group,
        rounds=dtype,
    )


def _words(packing: Packing, group: int) -> Words | None:
    """The words of rows of codes; None where no power of two of them makes a word."""
    codes = packing.codes_per_word
    order = places(*reversed(range(codes)))  # the first rows lie highest
    return None if codes & (codes - 1) else Words(codes, packing.bits, "apart", order, group=group, numbers=codes > 1)
