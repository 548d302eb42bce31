"""The search for scales that AutoRound runs where it does not tune: symmetric weights, rounded to nearest.

Source: the "optimized RTN" of auto-round 0.16, after the weighted search of llama.cpp's quantizers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore_gptq.auto_round.grid import Groups, Scales

SEARCHED_BITS = range(2, 8)  # 8 bits are rounded as they are


def search_scales(groups: Groups, bits: int, importance: Tensor | None = None) -> Scales:
    """The signed scale of each group, float32, that gives the least weighted squared error among some 200.

    importance: weight of each input column, float32 [K], such as the sum of its squared inputs; None counts all alike.
    """
    half = float(1 << (bits - 1))
    extreme = torch.where(groups.low.abs() > groups.high, groups.low, groups.high)
    weights = _grouped_importance(groups, importance)
    best = torch.full_like(extreme, torch.inf)
    scale = extreme / -half
    step, most = _candidates(bits)
    for count in range(-most, most + 1):
        inverse = -(half - step * count) / extreme
        candidate = inverse.reciprocal()
        codes = torch.mul(groups.values, inverse).round_().clamp_(-half, half - 1)
        error = codes.mul_(candidate).sub_(groups.values).square_().mul_(weights).sum(2, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, candidate, scale)
    return Scales(scale, torch.full_like(scale, half))


def _candidates(bits: int) -> tuple[float, int]:
    """The distance between candidates, in codes, and how many lie on each side."""
    if bits == 2:
        return 0.01, 90
    reach = 0.75 * (1 << (bits - 1))
    step = reach / 200 * 2
    return step, int(reach / step)


def _grouped_importance(groups: Groups, importance: Tensor | None) -> Tensor:
    if importance is None:
        return groups.values.new_ones(())
    missing = -groups.columns % groups.values.shape[2]
    padded = torch.nn.functional.pad(importance.to(groups.values), (0, missing))
    return padded.view(1, -1, groups.values.shape[2])
