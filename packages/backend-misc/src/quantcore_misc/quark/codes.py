"""How Quark stores codes: integers, one in a number or several in a word, and packed floats; each with its inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.formats.minifloat import minifloat, pack_fp4, pack_fp6, unpack_fp4, unpack_fp6
from quantcore.formats.packing import Layout, Piece, pack_words, stream_layout, unpack_words

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of every 8, whose code stands in each place of a word


class Integer(NamedTuple):
    """An integer element: bits of a code, the dtype that stores it or a word of it, and whether words hold several."""

    bits: int
    dtype: torch.dtype
    is_packed: bool
    is_signed: bool

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return (-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1) if self.is_signed else (0, (1 << self.bits) - 1)

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of unpacked codes."""
        return torch.int8 if self.is_signed else torch.uint8


INTEGERS = {
    "int2": Integer(2, torch.int32, is_packed=False, is_signed=True),
    "uint2": Integer(2, torch.uint8, is_packed=True, is_signed=False),
    "int3": Integer(3, torch.uint8, is_packed=True, is_signed=True),
    "int4": Integer(4, torch.int32, is_packed=True, is_signed=True),
    "uint4": Integer(4, torch.int32, is_packed=True, is_signed=False),
    "int8": Integer(8, torch.int8, is_packed=False, is_signed=True),
    "uint8": Integer(8, torch.uint8, is_packed=False, is_signed=False),
}


@dataclass(frozen=True)
class Packing:
    """How codes [N, K] lie in the tensor `weight`. shape: of that tensor. pack, unpack: inverses.

    multiples: what N and K must be multiples of. along_n, along_k: as of a `TensorSpec`. Codes are int8 or uint8
    integers, or as `minifloat.encode` gives them.
    """

    dtype: torch.dtype
    shape: Callable[[int, int], tuple[int, int]]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    size: Callable[[int, int], tuple[int, int]]
    multiples: tuple[int, int] = (1, 1)
    along_n: tuple[int, int] | None = (0, 1)
    along_k: tuple[int, int] | None = (1, 1)


@cache
def packing_for(element: str, strategy: str, is_reordered: bool) -> Packing:
    """The packing of an element. strategy: what shares a scale; integers of a "group" are stored transposed."""
    if element in INTEGERS:
        return _integers(element, strategy, is_reordered)
    bits = minifloat(element).bits
    if bits == 8:
        dtype = minifloat(element).dtype
        assert dtype is not None
        return Packing(dtype, _same, lambda codes: codes, lambda stored, N, K: stored, _same)
    pack, unpack = (pack_fp4, unpack_fp4) if bits == 4 else (pack_fp6, unpack_fp6)
    return Packing(
        torch.uint8,
        lambda N, K: (N, K * bits // 8),
        pack,
        lambda stored, N, K: unpack(stored),
        lambda rows, columns: (rows, columns * 8 // bits),
        (1, 2 if bits == 4 else 4),
        along_k=(1, 2) if bits == 4 else None,
    )


@cache
def layout_of(element: str, is_reordered: bool) -> Layout | None:
    """How codes of an integer lie in words or bytes; None where each has a number of its own.

    Eight codes of 4 bits in an int32; reordered: the columns of every eight stand in the order INTERLEAVE. Four of
    2 bits in a byte, the first in the highest bits. Eight of 3 bits in three bytes, the first in the lowest bits.
    """
    integer = INTEGERS[element]
    if not integer.is_packed:
        return None
    if element == "uint2":
        return Layout(2, 8, 4, 1, tuple(Piece(code, 0, 0, 6 - 2 * code, 2) for code in range(4)))
    plain = stream_layout(integer.bits, 8 * integer.dtype.itemsize)
    if integer.bits != 4 or not is_reordered:
        return plain
    moved = tuple(replace(piece, code=piece.code // 8 * 8 + INTERLEAVE[piece.code % 8]) for piece in plain.pieces)
    return replace(plain, pieces=moved, bytewise=False)


def pack_integers(codes: Tensor, element: str, is_reordered: bool) -> Tensor:
    """Codes, int8 or uint8 of any rank, as they are stored: along the last dimension, a single number as itself."""
    layout, integer = layout_of(element, is_reordered), INTEGERS[element]
    if layout is None or codes.ndim == 0:
        return codes.to(integer.dtype).contiguous()
    return pack_words(codes.view(torch.uint8) & ((1 << integer.bits) - 1), layout, -1)


def unpack_integers(stored: Tensor, count: int, element: str, is_reordered: bool) -> Tensor:
    """count codes along the last dimension; the inverse of `pack_integers`: int8 where signed, else uint8."""
    layout, integer = layout_of(element, is_reordered), INTEGERS[element]
    if layout is None or stored.ndim == 0:
        return stored.to(integer.code_dtype)
    codes = unpack_words(stored, layout, count, -1)
    unused = 8 - integer.bits
    return (codes << unused).view(torch.int8) >> unused if integer.is_signed else codes


def _integers(element: str, strategy: str, is_reordered: bool) -> Packing:
    layout, dtype, by_rows = layout_of(element, is_reordered), INTEGERS[element].dtype, strategy != "group"
    codes, words = (1, 1) if layout is None else (layout.codes, layout.words)

    def pack(matrix: Tensor) -> Tensor:
        return pack_integers(matrix if by_rows else matrix.t(), element, is_reordered)

    def unpack(stored: Tensor, N: int, K: int) -> Tensor:
        matrix = unpack_integers(stored, K if by_rows else N, element, is_reordered)
        return matrix if by_rows else matrix.t().contiguous()  # one copy of bytes, before four of floats

    # An index of a tensor of words covers whole codes, or the tensor cannot be cut. Zero points of rows are packed
    # along N as well, so that a weight whose zero points cannot be cut is not cut either.
    lines, along = (None, None) if codes % words else ((0, 1), (1, codes // words))
    if by_rows:
        rows = 1 if strategy == "tensor" else codes
        shape, size = lambda N, K: (N, K // codes * words), lambda rows, columns: (rows, columns // words * codes)
        return Packing(dtype, shape, pack, unpack, size, (rows, codes), lines, along)
    shape, size = lambda N, K: (K, N // codes * words), lambda rows, columns: (columns // words * codes, rows)
    return Packing(dtype, shape, pack, unpack, size, (codes, 1), along, lines)


def _same(rows: int, columns: int) -> tuple[int, int]:
    return rows, columns
