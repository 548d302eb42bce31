"""How sure a mean over the windows of a text is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

RESAMPLES = 2000
CONFIDENCE = 0.95
_SEED = 0  # the same windows give the same interval
_DRAWN = 1 << 22  # windows that are drawn at a time


def bootstrap_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float] | None:
    """Bounds between which sum(sums) / sum(counts) lies when windows are drawn anew: a 95 % percentile interval.

    sums: of a quantity, a number a window. counts: of the tokens it was summed over. None where fewer than two windows
    say nothing of their spread, or a sum is not finite.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if len(sums) < 2 or not all(map(math.isfinite, sums)):
        return None
    values = torch.tensor([list(sums), list(counts)], dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(_SEED)
    means = []
    left = RESAMPLES
    while left:
        rows = min(left, max(1, _DRAWN // len(sums)))
        drawn = torch.randint(len(sums), (rows, len(sums)), generator=generator, device="cpu")
        total, tokens = values[:, drawn].sum(-1)
        means.append(total / tokens)
        left -= rows
    outside = (1 - CONFIDENCE) / 2
    low, high = torch.cat(means).quantile(torch.tensor([outside, 1 - outside], dtype=torch.float64)).tolist()
    return low, high
