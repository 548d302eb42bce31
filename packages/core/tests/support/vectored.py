"""A weight format of codebook vectors for every layout of their codes, with a decoder of both contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.families import Vector, column_grouping
from quantcore.kernels.triton.decoder import Decoder, Words, places

LAYOUTS = {
    "one_book": Words(1, 8, "k", vector=8),
    "two_books_side_by_side": Words(1, 8, "k", vector=8, books=2),
    "three_books_in_groups": Words(1, 6, "k", vector=4, books=3, group=16),
    "book_of_11_bits": Words(1, 11, "k", vector=8, group=32),
    "pairs_in_packed_words": Words(8, 4, "k", places(*range(8)), vector=2, group=32),
    "stream_of_6_bits": Words(16, 6, "stream", stride=3, vector=4, group=64),
}


class Books(NamedTuple):
    """count, length and size: codebooks, entries of one, values of an entry. run: columns of a group, 0 for all."""

    count: int
    length: int
    size: int
    run: int


@dataclass(frozen=True)
class Vectored(WeightFormat):
    """Sums of codebook entries times a scale for each group; the numbers are those of the family."""

    layout: str

    @property
    def words(self) -> Words:
        return LAYOUTS[self.layout]

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("words", "codebooks", "scale", "codes")

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        raise NotImplementedError("its tensors are made by quantize alone")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        words = self.words
        group = words.group or weight.shape[1]
        codes = (weight[:, :: words.vector] * 1000).int() & ((1 << words.bits) - 1)  # [N, K / V]
        codes = torch.stack([(codes * (1 + 2 * book)) % (1 << words.bits) for book in range(words.books)])
        generator = torch.Generator().manual_seed(3)
        codebooks = torch.randn(words.books, 1 << words.bits, words.vector, generator=generator).half()
        scale = weight[:, ::group].abs().contiguous() + 0.1  # [N, G]
        return {"words": pack(codes, words), "codebooks": codebooks, "scale": scale, "codes": codes}

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Vector:
        books = tuple(book[:, None, :].float() for book in tensors["codebooks"])
        grouping = column_grouping(shape[1], self.words.group or shape[1])
        bits = self.words.bits * self.words.books / self.words.vector
        return Vector(tensors["codes"], books, tensors["scale"].reshape(-1), grouping, bits)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.lower(tensors, shape).dequantize(dtype)


def pack(codes: Tensor, words: Words) -> Tensor:
    """codes [M, N, K / V] as the words of a layout."""
    if words.along == "stream":
        bits = codes[0].long()[:, :, None] >> torch.arange(words.bits) & 1
        return (bits.reshape(codes.shape[1], -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    if words.codes > 1:
        split = codes[0].long().view(codes.shape[1], -1, words.codes)
        return (split << words.bits * torch.arange(words.codes)).sum(-1).to(torch.int32)
    wrapped = torch.where(codes >= 1 << (words.bits - 1), codes - (1 << words.bits), codes)  # as signed integers
    side_by_side = wrapped.permute(1, 2, 0).reshape(codes.shape[1], -1)
    return side_by_side.to(torch.int8 if words.bits <= 8 else torch.int16)


@triton.jit
def decode_vectors(tensors, k, n, N, K, D: tl.constexpr):
    COUNT: tl.constexpr = D.count
    values = tl.zeros((n.shape[0], k.shape[1]), tl.float32)
    for book in tl.static_range(COUNT):
        code = tl.load(tensors[3] + (book * N + n) * (K // D.size) + k // D.size)
        values += tl.load(tensors[1] + (book * D.length + code) * D.size + k % D.size).to(tl.float32)
    groups, group = tl.full([], 1, n.dtype), k * 0
    if D.run > 0:
        groups, group = groups * (K // D.run), k // D.run
    return values * tl.load(tensors[2] + n * groups + group)


@triton.jit
def entries_of_codes(tensors, codes, book, n, g, N, K, D: tl.constexpr):
    place = (book * D.length + codes) * D.size + tl.arange(0, D.size)[None, None, None, :]
    return tl.load(tensors[1] + place).to(tl.float32)


@triton.jit
def factor_of_groups(tensors, n, g, N, K, D: tl.constexpr):
    place = n + g
    if D.run > 0:
        place = n * (K // D.run) + g
    return tl.load(tensors[2] + place)


def vector_decoder(layout: str, words: bool = True) -> Decoder:
    """The decoder of `Vectored(layout)`; without words it gathers."""
    held = LAYOUTS[layout]
    return Decoder(
        name=f"vectored {layout}",
        decode=decode_vectors,
        constants=Books(held.books, 1 << held.bits, held.vector, held.group),
        views=(None, None, None, None),
        dtype=torch.float32,
        words=held if words else None,
        vector=entries_of_codes,
        factor=factor_of_groups,
    )
