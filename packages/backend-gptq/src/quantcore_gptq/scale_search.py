"""The grid of a group: as wide as its values, or narrower where that loses less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quantcore_gptq.rounding import affine_of, round_to

_STEPS = 100  # the range is shrunk in steps of 1/100
_TRIED = 80


class GridSettings(Protocol):
    @property
    def bits(self) -> int: ...
    @property
    def sym(self) -> bool: ...
    @property
    def mse(self) -> float: ...
    @property
    def zero_range(self) -> tuple[int, int]: ...


def fit_groups(
    columns: Tensor, size: int, settings: GridSettings, costs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [G, N] of each run of `size` columns [K, N] float32; the last may be short.

    costs: [K], by which the search multiplies the error of each column; None counts all alike.
    """
    costs = columns.new_ones(len(columns)) if costs is None else costs
    whole = len(columns) // size
    cut = whole * size
    parts = [(columns[:cut].unflatten(0, (whole, size)), costs[:cut].view(whole, size, 1))] if whole else []
    if len(columns) % size:
        parts.append((columns[None, cut:], costs[None, cut:, None]))
    fitted = [_fit(values, cost, settings) for values, cost in parts]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def _fit(values: Tensor, costs: Tensor, settings: GridSettings) -> tuple[Tensor, Tensor]:
    """Scale and zero point [G, N] of values [G, size, N]; costs: [G, size, 1]."""
    low, high = torch.aminmax(values, dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale, zero = affine_of(low, high, settings.bits, settings.sym, *settings.zero_range)
    if settings.mse <= 0:
        return scale, zero
    best = torch.full_like(scale, torch.inf)
    for step in range(_TRIED):
        shrink = 1 - step / _STEPS
        for tried in _grids(shrink * low, shrink * high, settings):
            error = _error(values, *tried, settings).mul_(costs).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return scale, zero


def _grids(low: Tensor, high: Tensor, settings: GridSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """The grids to try for a range. With four codes, the zero point on the other side of the exact one counts too."""
    scale, zero = affine_of(low, high, settings.bits, settings.sym, *settings.zero_range)
    yield scale, zero
    if settings.bits == 2 and not settings.sym:
        exact = torch.where(low == high, zero, -low / scale)
        yield scale, (exact.floor() + exact.ceil() - zero).clamp(*settings.zero_range)


def _error(values: Tensor, scale: Tensor, zero: Tensor, settings: GridSettings) -> Tensor:
    """|rounded - value| ** mse, [G, size, N]."""
    scale, zero = scale[:, None], zero[:, None]
    rounded = round_to(values, scale, zero, settings.bits).sub_(zero).mul_(scale)
    return rounded.sub_(values).abs_().pow_(settings.mse)
