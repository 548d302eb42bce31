"""Grids with a scale and a zero point per group: how those of integers are chosen, and rounding to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import minifloat


@dataclass(frozen=True)
class Grid:
    """w = (code - zero) * scale with codes 0 .. 2**bits - 1. scale, zero: [N, G]; size: columns of a group."""

    scale: Tensor
    zero: Tensor
    size: int
    bits: int

    def encode(self, weight: Tensor) -> Tensor:
        """Codes [N, K] uint8 of the nearest values; the last group may be short."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        whole = weight.shape[1] // self.size
        cut = whole * self.size
        if whole:
            part = weight[:, :cut].unflatten(1, (whole, self.size))
            codes[:, :cut] = _encode(part, self.scale[:, :whole, None], self.zero[:, :whole, None], self.bits).flatten(
                1
            )
        if cut < weight.shape[1]:
            codes[:, cut:] = _encode(weight[:, cut:], self.scale[:, whole:], self.zero[:, whole:], self.bits)
        return codes


def fit_grid(weight: Tensor, size: int, bits: int, sym: bool, lowest: int = 0, highest: int | None = None) -> Grid:
    """The grid of each run of `size` columns of a weight [N, K] that just covers its smallest and largest value.

    sym: the zero point is 2**(bits-1). Else it is rounded, within [lowest, highest] (highest None: 2**bits - 1).
    Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323), section 4; asymmetric min-max rounding.
    """
    low, high = _bounds(weight, size)
    scale, zero = affine_of(low, high, bits, sym, lowest, highest)
    return Grid(scale, zero, size, bits)


def affine_of(
    low: Tensor, high: Tensor, bits: int, sym: bool, lowest: int = 0, highest: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32, of codes that cover [low, high], which holds 0; [0, 0] counts as [-1, 1]."""
    top = (1 << bits) - 1
    if sym:
        high = torch.maximum(-low, high)
        low = -high  # also where no value is negative: codes above the middle alone would not reach them
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).smallest_normal)
    if sym:
        return scale, torch.full_like(scale, float((top + 1) // 2))
    return scale, torch.round(-low / scale).clamp(lowest, top if highest is None else highest)


def round_to(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes, as floats, of the nearest values of a grid."""
    return torch.round(values / scale).add_(zero).clamp_(0, (1 << bits) - 1)


@dataclass(frozen=True)
class Integers:
    """Codes 0 .. 2**bits - 1."""

    bits: int

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
        """The nearest values of a grid, a new tensor; their codes are written to codes, uint8."""
        found = round_to(values, scale, zero, self.bits)
        codes.copy_(found)
        return found.sub_(zero).mul_(scale)


@dataclass(frozen=True)
class SmallFloats:
    """Codes of a small float: w = value(code) * scale."""

    element: str

    def nearest(self, values: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
        """As `Integers.nearest`; zero has no meaning, and a scale of 0 gives 0."""
        element = minifloat.minifloat(self.element)
        found = minifloat.encode((values / scale).masked_fill_(scale == 0, 0.0), element)
        codes.copy_(found.view(torch.uint8))
        return minifloat.decode(found, element).mul_(scale)


def _encode(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return round_to(values.float(), scale, zero, bits).to(torch.uint8)


def _bounds(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, float32 [N, G], widened to hold 0."""
    whole = weight.shape[1] // size
    cut = whole * size
    parts = []
    if whole:
        parts.append(torch.aminmax(weight[:, :cut].unflatten(1, (whole, size)), dim=2))
    if cut < weight.shape[1]:
        parts.append(torch.aminmax(weight[:, cut:], dim=1, keepdim=True))
    low = torch.cat([part.min for part in parts], 1).float().clamp(max=0)
    high = torch.cat([part.max for part in parts], 1).float().clamp(min=0)
    return low, high
