"""The integer grids of AutoRound: signed full range for symmetric weights, min and max for asymmetric ones.

A symmetric scale is signed: it maps the value of largest magnitude to the lowest code, -2**(bits-1), which a grid of
positive scales leaves unused for every second group. Source: Cheng et al. 2023, SignRound (arXiv:2309.05516), section
3; docs/full_range_sym.md of auto-round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SCALE = 1.0013580322265625e-05  # 1e-5 in float16, upstream's bound


@dataclass(frozen=True)
class Groups:
    """A weight [N, K] in groups of `size` columns, float32 [N, G, size]; a short last group is filled with zeros.

    low, high: the smallest and the largest value of each group, [N, G, 1], widened to hold 0.
    """

    values: Tensor
    low: Tensor
    high: Tensor
    columns: int

    @classmethod
    def of(cls, weight: Tensor, size: int) -> Groups:
        """The groups of a weight of any float dtype."""
        missing = -weight.shape[1] % size
        values = torch.nn.functional.pad(weight.detach().float(), (0, missing)).unflatten(1, (-1, size))
        low, high = torch.aminmax(values, dim=2, keepdim=True)
        return cls(values, low.clamp_(max=0), high.clamp_(min=0), weight.shape[1])

    def ungroup(self, values: Tensor) -> Tensor:
        """Values [N, G, size] as [N, K]."""
        return values.flatten(1)[:, : self.columns]


@dataclass(frozen=True)
class Scales:
    """w = (code - zero) * scale for codes 0 .. 2**bits - 1. scale, zero: float32 [N, G, 1], scale as it is stored."""

    scale: Tensor
    zero: Tensor


def symmetric_scales(
    groups: Groups, bits: int, low_factor: Tensor | float = 1.0, high_factor: Tensor | float = 1.0
) -> Scales:
    """Scales of the signed full-range grid, rounded to float16; the factors shrink the ends of each group's range."""
    half = float(1 << (bits - 1))
    low, high = groups.low * -low_factor, groups.high * high_factor
    scale = torch.where(low > high, low, -high) / half
    return Scales(_stored(scale), torch.full_like(scale, half))


def asymmetric_scales(
    groups: Groups, bits: int, low_factor: Tensor | float = 1.0, high_factor: Tensor | float = 1.0
) -> Scales:
    """Scales and zero points that cover [low, high], scales rounded to float16."""
    low, high = groups.low * low_factor, groups.high * high_factor
    scale = _stored((high - low) / float((1 << bits) - 1))
    return Scales(scale, torch.round(-low / scale))


def encode(groups: Groups, scales: Scales, bits: int, offset: Tensor | float = 0.0) -> Tensor:
    """Codes [N, G, size] as whole float32 numbers; offset is added before rounding."""
    steps = torch.div(groups.values, scales.scale).add_(offset).round_()
    return steps.add_(scales.zero).clamp_(0, float((1 << bits) - 1))


def _stored(scale: Tensor) -> Tensor:
    """Scales as float16 holds them, at least LEAST_SCALE in magnitude; what is not negative counts as positive."""
    half = scale.to(torch.float16).float()
    return torch.where(half < 0, half.clamp(max=-LEAST_SCALE), half.clamp(min=LEAST_SCALE))
