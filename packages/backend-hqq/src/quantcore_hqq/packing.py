"""Packed storage of HQQ and SINQ: a matrix of codes, split over its rows, several codes to a word.

The rows of the grouped code matrix [R, C] are cut into equal blocks, and word [i, c] holds code [i, c] of every
block, the first block in the highest bits. Source: the layouts that hqq 0.2.8 and sinq 0.2.0 write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How one packing lays codes in words; `pads_rows` says whether missing rows are stored as zeros or refused."""

    bits: int
    codes_per_word: int
    word_dtype: torch.dtype
    pads_rows: bool = False

    @property
    def shifts(self) -> range:
        """Bits by which the code of each block is shifted up, first block first."""
        return range((self.codes_per_word - 1) * self.bits, -1, -self.bits)


PACKINGS = {
    "8bit_u8": Packing(bits=8, codes_per_word=1, word_dtype=torch.uint8),
    "6bit_32": Packing(bits=6, codes_per_word=5, word_dtype=torch.int32, pads_rows=True),
    "5bit_32": Packing(bits=5, codes_per_word=6, word_dtype=torch.int32, pads_rows=True),
    "4bit_u8": Packing(bits=4, codes_per_word=2, word_dtype=torch.uint8),
    "3bit_32": Packing(bits=3, codes_per_word=10, word_dtype=torch.int32, pads_rows=True),
    "2bit_u8": Packing(bits=2, codes_per_word=4, word_dtype=torch.uint8),
    "1bit_u8": Packing(bits=1, codes_per_word=8, word_dtype=torch.uint8),
}


def word_dtype(packing: str) -> torch.dtype:
    """Dtype of the packed words: int32 where the name ends in `_32`, uint8 for the others."""
    return _layout(packing).word_dtype


def packed_rows(rows: int, packing: str) -> int:
    """Rows of words that hold `rows` rows of codes.

    Raises ValueError where `rows` does not divide into equal blocks; those in int32 pad and take any number.
    """
    layout = _layout(packing)
    if rows % layout.codes_per_word and not layout.pads_rows:
        raise ValueError(
            f"{packing} packing: {rows} rows of codes do not divide into {layout.codes_per_word} equal blocks; "
            f"use a group_size or axis that gives a multiple of {layout.codes_per_word} rows, or another bit width"
        )
    return -(-rows // layout.codes_per_word)


def pack(codes: Tensor, packing: str) -> Tensor:
    """Words [packed_rows(R), C] that hold the codes [R, C].

    codes: uint8, each below 2**bits (not checked: higher bits would spill into the neighbours); any strides and device.
    Raises ValueError for another dtype, an unknown packing or an indivisible number of rows.
    """
    layout = _layout(packing)
    _require_dtype(codes, torch.uint8, f"{packing} packing takes codes")
    step = packed_rows(codes.shape[0], packing)
    words = torch.zeros((step, *codes.shape[1:]), dtype=layout.word_dtype, device=codes.device)
    for block in range(layout.codes_per_word):
        part = codes[block * step : (block + 1) * step]
        words.bitwise_left_shift_(layout.bits)
        words[: part.shape[0]].bitwise_or_(part)
    return words


def unpack(words: Tensor, packing: str, rows: int) -> Tensor:
    """Codes [rows, C] uint8 that `pack` stored in words.

    words: [packed_rows(rows), C] of `word_dtype(packing)`; any strides and device.
    Raises ValueError for another dtype or number of rows.
    """
    layout = _layout(packing)
    _require_dtype(words, layout.word_dtype, f"{packing} words are read")
    step = packed_rows(rows, packing)
    if words.shape[0] != step:
        raise ValueError(
            f"{packing} packing: {rows} rows of codes need {step} rows of words, found {words.shape[0]}; check rows"
        )
    codes = torch.empty((rows, *words.shape[1:]), dtype=torch.uint8, device=words.device)
    for block, shift in enumerate(layout.shifts):
        part = codes[block * step : (block + 1) * step]
        torch.bitwise_right_shift(words[: part.shape[0]], shift, out=part).bitwise_and_(2**layout.bits - 1)
    return codes


def unpack_rows(words: Tensor, packing: str, rows: int, wanted: Tensor) -> Tensor:
    """The wanted rows [R, C] of the codes that `unpack` gives, without unpacking the others. wanted: int64 [R]."""
    layout = _layout(packing)
    step = packed_rows(rows, packing)
    shifts = torch.tensor(layout.shifts, dtype=layout.word_dtype, device=words.device)
    shift = shifts.index_select(0, wanted // step)
    codes = words.index_select(0, wanted % step).bitwise_right_shift_(shift[:, None])
    return codes.bitwise_and_(2**layout.bits - 1).to(torch.uint8)


def _layout(packing: str) -> Packing:
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r} is not known; use one of {', '.join(PACKINGS)}")
    return PACKINGS[packing]


def _require_dtype(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{what} as {dtype}, found {tensor.dtype}; cast or view the tensor first")
