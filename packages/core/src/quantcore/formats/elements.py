"""The elements that a grid of numbers consists of: integers of any sign and zero, small floats; and levels of a table.

An element says what a code is as a number, how steps are rounded to codes, and which bits hold a code. Codes are held
one in a byte: int8 or uint8 numbers of an `Integer`, codes as `minifloat.encode` gives them of a `Float`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from quantcore.formats.base import Description
from quantcore.formats.minifloat import MiniFloat, decode, encode, minifloat

# The 16 levels of NF4: Dettmers et al. 2023, QLoRA, appendix E (arXiv:2305.14314), as float32 of published checkpoints.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, repr=False)
class Integer(Description):
    """An integer of `bits` bits: two's complement if is_signed, else the bits less bias.

    bias: the stored code of the number 0, such as 1 << (bits - 1) of signed numbers that are stored without a sign.
    """

    bits: int = 8
    is_signed: bool = True
    bias: int = 0

    @property
    def low(self) -> int:
        """The least number."""
        return -(1 << (self.bits - 1)) if self.is_signed else -self.bias

    @property
    def high(self) -> int:
        """The largest number."""
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of codes, which are the numbers themselves."""
        return torch.int8 if self.low < 0 else torch.uint8

    def round(self, steps: Tensor) -> Tensor:
        """The codes nearest to steps, ties to even; steps are overwritten."""
        return steps.round_().clamp_(self.low, self.high).to(self.dtype)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers of codes, a new tensor of dtype."""
        return codes.to(dtype)

    def to_bits(self, codes: Tensor) -> Tensor:
        """The bits of codes, uint8."""
        raw = codes.view(torch.uint8)
        return raw & ((1 << self.bits) - 1) if self.is_signed else raw + self.bias

    def from_bits(self, raw: Tensor) -> Tensor:
        """Codes of bits, the inverse of `to_bits`."""
        if not self.is_signed:
            return (raw - self.bias if self.bias else raw).view(self.dtype)
        unused = 8 - self.bits
        return (raw << unused).view(torch.int8) >> unused


@dataclass(frozen=True, repr=False)
class Float(Description):
    """A small float by the name that `minifloat` knows. ties: how it is rounded, see `minifloat.encode`."""

    name: str = "e4m3"
    ties: str = "even"

    @property
    def minifloat(self) -> MiniFloat:
        return minifloat(self.name)

    @property
    def bits(self) -> int:
        return self.minifloat.bits

    @property
    def low(self) -> float:
        """The least finite number."""
        return -self.minifloat.maximum

    @property
    def high(self) -> float:
        """The largest finite number."""
        return self.minifloat.maximum

    @property
    def dtype(self) -> torch.dtype:
        """Of codes."""
        return self.minifloat.dtype or torch.uint8

    def round(self, steps: Tensor) -> Tensor:
        """The codes nearest to steps, saturated."""
        return encode(steps, self.minifloat, self.ties)

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers of codes, a new tensor of dtype."""
        return decode(codes, self.minifloat, dtype)

    def to_bits(self, codes: Tensor) -> Tensor:
        """The bits of codes, uint8."""
        return codes.view(torch.uint8)

    def from_bits(self, raw: Tensor) -> Tensor:
        """Codes of bits, the inverse of `to_bits`."""
        return raw.view(self.dtype)


Element: TypeAlias = Integer | Float
