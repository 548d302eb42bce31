"""How Quark stores codes: one in a byte, eight in a word, or packed floats. Each pack has its exact inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from quantcore.formats.minifloat import minifloat, pack_fp4, pack_fp6, unpack_fp4, unpack_fp6
from quantcore.formats.packing import Layout, pack_words, stream_layout, unpack_words

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of every 8, whose code stands in each place of a word
_BYTES = {"int8": torch.int8, "uint8": torch.uint8}


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
    along_n: tuple[int, int] = (0, 1)
    along_k: tuple[int, int] | None = (1, 1)


@cache
def packing_for(element: str, by_rows: bool, is_reordered: bool) -> Packing:
    """The packing of an element. by_rows: 4-bit integers lie along K, else transposed and along N."""
    if element in ("int4", "uint4"):
        return _words(element, by_rows, word_layout(is_reordered))
    if element in _BYTES:
        return Packing(_BYTES[element], _same, lambda codes: codes, lambda stored, N, K: stored, _same)
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
def word_layout(is_reordered: bool) -> Layout:
    """Eight 4-bit codes in an int32 word; reordered: the columns of every eight stand in the order INTERLEAVE."""
    plain = stream_layout(4)
    if not is_reordered:
        return plain
    moved = tuple(replace(piece, code=piece.code // 8 * 8 + INTERLEAVE[piece.code % 8]) for piece in plain.pieces)
    return replace(plain, pieces=moved, bytewise=False)


def pack_nibbles(codes: Tensor, is_reordered: bool) -> Tensor:
    """Signed or unsigned 4-bit codes, along the last dimension of a matrix, in int32 words."""
    return pack_words(codes.view(torch.uint8) & 0xF, word_layout(is_reordered), 1)


def unpack_nibbles(words: Tensor, count: int, element: str, is_reordered: bool) -> Tensor:
    """Codes of words; the inverse of `pack_nibbles`: int8 for int4, else uint8."""
    return _signed(unpack_words(words, word_layout(is_reordered), count, 1), element)


def _words(element: str, by_rows: bool, layout: Layout) -> Packing:
    def pack(codes: Tensor) -> Tensor:
        nibbles = codes.view(torch.uint8) & 0xF
        return pack_words(nibbles if by_rows else nibbles.t(), layout, 1)

    def unpack(stored: Tensor, N: int, K: int) -> Tensor:
        codes = _signed(unpack_words(stored, layout, K if by_rows else N, 1), element)
        return codes if by_rows else codes.t()

    if by_rows:
        shape, size = lambda N, K: (N, K // 8), lambda rows, columns: (rows, columns * 8)
        return Packing(torch.int32, shape, pack, unpack, size, (8, 8), along_k=(1, 8))
    shape, size = lambda N, K: (K, N // 8), lambda rows, columns: (columns * 8, rows)
    return Packing(torch.int32, shape, pack, unpack, size, (8, 1), along_n=(1, 8), along_k=(0, 1))


def _signed(codes: Tensor, element: str) -> Tensor:
    """4-bit codes as numbers: two's complement for int4."""
    return (codes << 4).view(torch.int8) >> 4 if element == "int4" else codes


def _same(rows: int, columns: int) -> tuple[int, int]:
    return rows, columns
