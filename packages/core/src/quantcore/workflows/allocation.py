"""One choice for each of many items, so that the sum of errors is least and the sum of sizes within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_UNITS = 1 << 17  # that a budget is divided into, where sizes have no larger common divisor

Choice = tuple[int, float]  # size, error


def allocate(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The number of the choice that each item gets: the least sum of errors of all whose sizes keep the budget.

    Solved by a dynamic program over sizes: exact where the budget is at most 131,072 times the sizes' common divisor,
    else sizes are rounded up to so many parts of it, so that the budget is kept and up to a part for each item unused.
    Raises ValueError naming the smallest sum of sizes where the budget is smaller.
    """
    least = sum(min(size for size, _ in choices) for choices in items)
    if least > budget:
        raise ValueError(f"the smallest choices take {least:,} bytes, more than the {budget:,} that are allowed")
    free = budget - least  # beyond the smallest choice of each item
    extra = [[size - min(size for size, _ in choices) for size, _ in choices] for choices in items]
    common = math.gcd(*(size for sizes in extra for size in sizes)) or 1
    unit = common * max(1, math.ceil(free / common / _UNITS))
    units = free // unit
    best = torch.zeros(units + 1, dtype=torch.float64)
    taken: list[Tensor] = []
    for choices, sizes in zip(items, extra, strict=True):
        rows = torch.full((len(choices), units + 1), math.inf, dtype=torch.float64)
        for row, (_, error), size in zip(rows, choices, sizes, strict=True):
            step = -(-size // unit)
            if step <= units:
                row[step:] = best[: units + 1 - step] + error
        best, number = rows.min(0)
        taken.append(number.to(torch.uint8))
    left, chosen = units, []
    for numbers, sizes in zip(reversed(taken), reversed(extra), strict=True):
        chosen.append(int(numbers[left]))
        left -= -(-sizes[chosen[-1]] // unit)
    return chosen[::-1]
