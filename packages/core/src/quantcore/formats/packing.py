"""Packing of small codes into words, for the layouts that several formats share.

A layout says where each bit of a code stands. It repeats along one dimension in blocks of some codes and some words,
and is a list of pieces: runs of bits that are moved together. To pack and to unpack is to move each piece of every
block at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # bits -> widths of the bit planes, low bits first


@dataclass(frozen=True)
class Piece:
    """Bits [low, low + width) of code `code` of a block, which stand at bit `shift` of its word `word`."""

    code: int
    word: int
    low: int
    shift: int
    width: int


@dataclass(frozen=True)
class Layout:
    """How codes of `bits` bits lie in words of `word_bits` bits. codes, words: in one block.

    bytewise: the layout is the same bit stream whatever the size of a word.
    """

    bits: int
    word_bits: int
    codes: int
    words: int
    pieces: tuple[Piece, ...]
    bytewise: bool = False

    def count_words(self, count: int) -> int:
        """Words that hold count codes."""
        whole, rest = divmod(count, self.codes)
        return whole * self.words + max((piece.word + 1 for piece in self.pieces if piece.code < rest), default=0)

    def count_codes(self, words: int) -> int:
        """The most codes that lie wholly in this many words."""
        whole, rest = divmod(words, self.words)
        spilled = {piece.code for piece in self.pieces if piece.word >= rest}
        return whole * self.codes + min(spilled, default=0)


@cache
def stream_layout(bits: int, word_bits: int = 32) -> Layout:
    """One little-endian bit stream: code i at bit i * bits, spilling into the next word where it does not fit.

    Where bits divides word_bits, this is whole codes in each word, the first in the lowest bits.
    """
    length = math.lcm(bits, word_bits)
    pieces = []
    for code in range(length // bits):
        start, end = code * bits, (code + 1) * bits
        cut = min(end, (start // word_bits + 1) * word_bits)
        pieces.append(Piece(code, start // word_bits, 0, start % word_bits, cut - start))
        if cut < end:
            pieces.append(Piece(code, cut // word_bits, cut - start, 0, end - cut))
    return Layout(bits, word_bits, length // bits, length // word_bits, tuple(pieces), bytewise=True)


@cache
def padded_layout(bits: int, word_bits: int = 32) -> Layout:
    """As many whole codes as fit in each word, the first in the lowest bits; bits that are left over are zero."""
    codes = word_bits // bits
    pieces = tuple(Piece(code, 0, 0, code * bits, bits) for code in range(codes))
    return Layout(bits, word_bits, codes, 1, pieces)


@cache
def planar_layout(bits: int, word_bits: int = 32) -> Layout:
    """Blocks of word_bits codes whose bits are split into planes, low first, each packed as codes of its width."""
    pieces: list[Piece] = []
    low = 0
    for width in PLANES.get(bits, (bits,)):
        per_word, first = word_bits // width, low  # a plane of `width` bits takes as many words
        pieces += [
            Piece(code, first + code // per_word, low, code % per_word * width, width) for code in range(word_bits)
        ]
        low += width
    return Layout(bits, word_bits, word_bits, bits, tuple(pieces))


@cache
def ordered_layout(layout: Layout, order: tuple[int, ...]) -> Layout:
    """A layout of whole codes in each word, of which code i stands in place order[i], the lowest bits first.

    Raises ValueError where codes cross words, or order is none of a word's codes.
    """
    count = layout.word_bits // layout.bits
    if layout.bits * count != layout.word_bits or sorted(order) != list(range(count)):
        raise ValueError(f"order {order} is none of the {count} codes of {layout.bits} bits in {layout.word_bits}")
    pieces = tuple(replace(piece, shift=order[piece.code % count] * layout.bits) for piece in layout.pieces)
    return replace(layout, pieces=pieces, bytewise=False)


def pack_words(codes: Tensor, layout: Layout, dim: int = 0) -> Tensor:
    """Words that hold codes, packed along dim; bits that no code fills are zero.

    codes: uint8, each below 2**bits (not checked: higher bits would spill into the neighbours); any shape and strides.
    Returns words of the layout's size, contiguous: uint8 for 8 bits, else a signed integer dtype.
    """
    dim %= codes.ndim
    count = layout.count_words(codes.shape[dim])
    if layout.bytewise:
        packed = _pack(codes, stream_layout(layout.bits, 8), dim, count * layout.word_bits // 8)
        return _from_bytes(packed, _WORD_DTYPES[layout.word_bits], dim)
    return _pack(codes, layout, dim, count)


def unpack_words(words: Tensor, layout: Layout, count: int, dim: int = 0) -> Tensor:
    """The first count codes of words along dim, uint8, contiguous; the inverse of `pack_words`."""
    dim %= words.ndim
    if layout.bytewise:
        return _unpack(_to_bytes(words, dim), stream_layout(layout.bits, 8), dim, count)
    return _unpack(words, layout, dim, count)


def pack_nibbles(codes: Tensor, *, high_first: bool, padding: int = 0) -> Tensor:
    """4-bit codes [n] uint8 as bytes [ceil(n/2)]: even elements in the high nibble if high_first, else in the low one.

    An odd n is padded with the code `padding`.
    """
    even, odd = codes[0::2], codes[1::2]
    if odd.numel() < even.numel():
        odd = torch.cat([odd, odd.new_full((1,), padding)])
    high, low = (even, odd) if high_first else (odd, even)
    return (high << 4) | low


def unpack_nibbles(packed: Tensor, count: int, *, high_first: bool) -> Tensor:
    """The first count 4-bit codes of bytes, as uint8 [count]; the inverse of `pack_nibbles`."""
    data = packed.reshape(-1)
    codes = data.new_empty(data.numel(), 2)
    codes[:, 0 if high_first else 1] = data >> 4
    codes[:, 1 if high_first else 0] = data & 0xF
    return codes.view(-1)[:count]


_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def _to_bytes(words: Tensor, dim: int) -> Tensor:
    """Words as bytes, those of a word one after the other along dim: shifting bytes takes a fraction of the time."""
    if words.dtype == torch.uint8:
        return words
    flat = words.reshape(-1)
    if flat.stride(0) != 1:  # of one word, for which any stride counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    split: Tensor = flat.view(torch.uint8).view(*words.shape, words.itemsize)
    return split.movedim(-1, dim + 1).flatten(dim, dim + 1)


def _from_bytes(packed: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """The words of bytes, the inverse of `_to_bytes`."""
    if dtype == torch.uint8:
        return packed
    size = dtype.itemsize
    split: Tensor = packed.unflatten(dim, (packed.shape[dim] // size, size)).movedim(dim + 1, -1)
    return split.contiguous().reshape(-1).view(dtype).view(split.shape[:-1])


def _pack(codes: Tensor, layout: Layout, dim: int, count: int) -> Tensor:
    if _merges(layout, codes, dim) and codes.shape[dim] == count * layout.codes:
        return _merged(codes, layout)
    shape = list(codes.shape)
    shape[dim] = count
    words = torch.zeros(shape, dtype=_WORD_DTYPES[layout.word_bits], device=codes.device)
    for piece in layout.pieces:
        part = _every(codes, dim, piece.code, layout.codes)
        target = _every(words, dim, piece.word, layout.words).narrow(dim, 0, part.shape[dim])
        if piece.width < layout.bits:
            part = (part >> piece.low) & ((1 << piece.width) - 1)
        target |= part.to(words.dtype) << piece.shift
    return words


def _unpack(words: Tensor, layout: Layout, dim: int, count: int) -> Tensor:
    if _merges(layout, words, dim) and count == words.shape[dim] * layout.codes:
        return _parted(words, layout)
    shape = list(words.shape)
    shape[dim] = count
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for piece in layout.pieces:
        target = _every(codes, dim, piece.code, layout.codes)
        source = _every(words, dim, piece.word, layout.words).narrow(dim, 0, target.shape[dim])
        part = (source >> piece.shift).to(torch.uint8)
        part &= (1 << piece.width) - 1
        if piece.low:
            target |= part << piece.low
        else:
            target.copy_(part)
    return codes


def _merges(layout: Layout, tensor: Tensor, dim: int) -> bool:
    """Whether several whole codes lie one after the other in bytes, along a dimension that is contiguous."""
    several = layout.bytewise and layout.word_bits == 8 and layout.bits in (1, 2, 4)
    return several and dim == tensor.ndim - 1 and tensor.is_contiguous()


def _merged(codes: Tensor, layout: Layout) -> Tensor:
    """Bytes of codes: a byte's codes are seen as one integer, whose halves are moved together until they are a byte."""
    flat = codes.reshape(-1)
    wide, step = (flat.clone() if flat.storage_offset() % layout.codes else flat).view(_OF_BYTES[layout.codes]), 1
    while step < layout.codes:
        wide = wide | (wide >> step * (8 - layout.bits))
        step *= 2
    return wide.to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // layout.codes)


def _parted(words: Tensor, layout: Layout) -> Tensor:
    """Codes of bytes; the inverse of `_merged`."""
    wide, step = words.reshape(-1).to(_OF_BYTES[layout.codes]), layout.codes
    while step > 1:
        step //= 2
        ones = (1 << step * layout.bits) - 1
        mask = sum(ones << 8 * place for place in range(0, layout.codes, step))
        wide = (wide | (wide << step * (8 - layout.bits))) & mask
    return wide.view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * layout.codes)


def _every(tensor: Tensor, dim: int, start: int, step: int) -> Tensor:
    """Elements start, start + step, ... along dim; none where start is outside."""
    return tensor[(slice(None),) * dim + (slice(start, None, step),)]
