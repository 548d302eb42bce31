"""The integer grid of AWQ: scales, zero points and codes of a weight, rounded to nearest.

Every step is done in the dtype in which scales are stored, as upstream does, so that the stored bytes are upstream's.
Source: Lin et al. 2024, AWQ (arXiv:2306.00978), in the order of operations of AutoAWQ 0.2.9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_RANGE = 1e-5  # AutoAWQ's; keeps scales above zero in float16


class Grid(NamedTuple):
    """What weights are rounded to. group: columns of a group."""

    bits: int
    group: int
    zero_point: bool


def ranges(groups: Tensor, bits: int, zero_point: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, [..., 1]; groups: [..., g], in the dtype to compute in.

    A group whose values have one sign gets a range that reaches to 0: its zero point could not be stored otherwise.
    """
    if not zero_point:
        top = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True).clamp_(min=LEAST_RANGE) / top
        return scale, torch.full_like(scale, top + 1)
    top = 2**bits - 1
    low, high = (edge.unsqueeze(-1) for edge in torch.aminmax(groups, dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp_(min=LEAST_RANGE) / top
    scale = torch.where(scale.isinf(), high / top - low / top, scale)  # the range of float16 is 65504
    return scale, (low / scale).round_().neg_().clamp_(0, top)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of groups [..., g] as whole numbers in their dtype."""
    return (groups / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def round_trip(weight: Tensor, grid: Grid) -> Tensor:
    """What a weight [N, K] becomes on the grid of its groups, in its own dtype: quantized and dequantized."""
    groups = weight.reshape(-1, grid.group)
    scale, zero = ranges(groups, grid.bits, grid.zero_point)
    return encode(groups, scale, zero, grid.bits).sub_(zero).mul_(scale).view(weight.shape)
