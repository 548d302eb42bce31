"""Zero points as GPTQ checkpoints store them: packed along N, and in most files less one.

`v2` stores the zero point z itself. `v1` stores z - 1, in two ways that differ where z is 0: AutoGPTQ subtracts from
each field, gptqmodel from whole words, so that a zero borrows from the field above and only adding to whole words
gives both back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.sdk import packing

CONVENTIONS = ("v1", "v1-words", "v2")
_WORD_BITS = (2, 4, 8)  # widths for which gptqmodel counts in whole words


def read_zeros(qzeros: Tensor, count: int, layout: packing.Layout, convention: str, sym: bool) -> Tensor:
    """Zero points [G, count], int16 for 8 bits, else uint8.

    sym: the weight is symmetric. Files with the wrong label are common then, and easily told: all zero points stand in
    the middle, so all fields are 2**(bits-1) in v2 and one less in v1, whatever convention says.
    """
    fields = _widened(packing.unpack_words(qzeros, layout, count, 1), layout.bits)
    zeros = fields if convention == "v2" else _plus_one(qzeros, fields, layout, convention)
    if not sym:
        return zeros
    middle = 1 << (layout.bits - 1)
    zeros = torch.where((fields == middle).all(), fields, zeros)
    return torch.where((fields == middle - 1).all(), fields + 1, zeros)


def write_zeros(zeros: Tensor, layout: packing.Layout, convention: str) -> Tensor:
    """The stored words of integer zero points [G, N]; the inverse of `read_zeros`.

    Raises ValueError naming the range when one is outside what the convention can store.
    """
    low, high = zero_range(layout.bits, convention)
    if zeros.numel() and not (low <= int(zeros.min()) and int(zeros.max()) <= high):
        raise ValueError(
            f"zero points lie in [{int(zeros.min())}, {int(zeros.max())}], {convention} holds {low}-{high}"
        )
    if convention == "v2":
        return packing.pack_words(zeros.to(torch.uint8), layout, 1)
    if convention == "v1-words" and layout.bits in _WORD_BITS:
        return packing.pack_words(zeros.to(torch.uint8), layout, 1) - _ones(layout)
    return packing.pack_words(((zeros - 1) & _mask(layout)).to(torch.uint8), layout, 1)


def zero_range(bits: int, convention: str) -> tuple[int, int]:
    """The least and the greatest zero point that a convention can store."""
    return (1, 1 << bits) if convention == "v1" else (0, (1 << bits) - 1)


def _plus_one(qzeros: Tensor, fields: Tensor, layout: packing.Layout, convention: str) -> Tensor:
    if convention == "v1":
        return fields + 1
    if layout.bits in _WORD_BITS:
        return _widened(packing.unpack_words(qzeros + _ones(layout), layout, fields.shape[1], 1), layout.bits)
    return (fields + 1) & _mask(layout)


def _widened(fields: Tensor, bits: int) -> Tensor:
    return fields.to(torch.int16) if bits == 8 else fields  # z may be 256


def _mask(layout: packing.Layout) -> int:
    return (1 << layout.bits) - 1


def _ones(layout: packing.Layout) -> int:
    """A word with 1 in every field."""
    return sum(1 << shift for shift in range(0, layout.word_bits, layout.bits))
