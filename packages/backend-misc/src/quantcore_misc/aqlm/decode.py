# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of AQLM weights: entries of codebooks that are added up, under a scale for each group of rows."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat, Words, float_dtype
from quantcore_misc.aqlm.format import Aqlm


class Books(NamedTuple):
    """books: codebooks. code_bits: of a code. rows, columns: of the weights that a code stands for."""

    books: int
    code_bits: int
    rows: int
    columns: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """The sum of the entries, in the order of the codebooks, times the scale; tensors as `Aqlm` stores them."""
    BOOKS: tl.constexpr = D.books  # what static_range is given must be a constexpr, not an int
    row, within = n // D.rows, n % D.rows * D.columns + k % D.columns
    first = (row * (K // D.columns) + k // D.columns) * BOOKS
    values = tl.zeros((n.shape[0], k.shape[1]), tl.float32)
    for book in tl.static_range(BOOKS):
        code = tl.load(tensors[0] + first + book).to(tl.int32) & ((1 << D.code_bits) - 1)
        entry = ((book << D.code_bits) + code) * (D.rows * D.columns) + within
        values += tl.load(tensors[1] + entry).to(tl.float32)
    return values * tl.load(tensors[2] + row).to(tl.float32)


@triton.jit
def entries(tensors, codes, book, n, g, N, K, D: tl.constexpr):
    """The entries of codes in one codebook, of groups of one row."""
    entry = ((book << D.code_bits) + codes) * D.columns + tl.arange(0, D.columns)[None, None, None, :]
    return tl.load(tensors[1] + entry).to(tl.float32)


@triton.jit
def factor(tensors, n, g, N, K, D: tl.constexpr):
    """The scale of a row."""
    return tl.load(tensors[2] + n + g).to(tl.float32)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of AQLM's weights; None for any other format."""
    if not isinstance(weight_format, Aqlm) or float_dtype(weight_format.float_type, "float_type") not in TRITON_DTYPES:
        return None
    books, columns = weight_format.codebooks, weight_format.in_group
    in_tiles = weight_format.out_group == 1 and columns > 1 and columns & (columns - 1) == 0
    return Decoder(
        name=f"aqlm {books}x{weight_format.bits} groups of {weight_format.out_group}x{columns}",
        decode=decode,
        constants=Books(books, weight_format.bits, weight_format.out_group, columns),
        views=(None, None, None),
        dtype=torch.float32,
        words=Words(1, weight_format.bits, "k", vector=columns, books=books) if in_tiles else None,
        vector=entries,
        factor=factor,
    )
