"""GPTQ for one weight: each column is rounded, and the columns after it make up for its error.

Pure functions on tensors. The weight is kept transposed, [K, N], so that a column of the weight is contiguous.
Source: Frantar et al. 2022, GPTQ (arXiv:2210.17323), algorithm 1. Order of columns within groups: Gafni et al. 2025
(arXiv:2505.14638).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.sdk import threads
from quantcore_gptq.gptq.order import Order, order_of
from quantcore_gptq.gptq.settings import Settings
from quantcore_gptq.rounding import Grid, Integers, SmallFloats
from quantcore_gptq.scale_search import fit_groups

logger = logging.getLogger(__name__)

BLOCK = 128  # columns whose error is carried on to all others at once
_INNER = 32  # of them, those whose error is carried on within the block at once; they stay in cache
_FLOORS = 6


class HessianError(ValueError):
    """The inputs of a layer say too little of its weights: their Hessian has no inverse, however much is added."""


@dataclass(frozen=True)
class Solution:
    """codes: [N, K] uint8 on grid. index: [K] int32, the group of each column; None for runs.

    losses: [N] float32, half the sum of a row's squared rounding errors, each in units of what the columns after it can
    make up for: the squared error of the layer's output, with damping, over the number of tokens.
    """

    codes: Tensor
    grid: Grid
    index: Tensor | None
    losses: Tensor


@dataclass(frozen=True)
class Curvature:
    """What GPTQ needs of a layer's inputs; layers with the same inputs and settings share it.

    inverse: [K, K] float32, the factor of the damped inverse Hessian in `order`. dead: [K] bool, inputs that are always
    0. damp: what was added to the diagonal in the end.
    """

    order: Order
    inverse: Tensor
    dead: Tensor
    damp: float


def curvature(hessian: Tensor, settings: Settings) -> Curvature:
    """The order of columns and the inverse factor for a Hessian [K, K] float32, which is overwritten.

    Raises HessianError when the Hessian is not finite or has no inverse.
    """
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    order = order_of(hessian.diagonal(), settings)
    inverse, damp = inverse_factor(order.apply(hessian), settings.damp, settings.damp_step)
    return Curvature(order, inverse, dead, damp)


def solve(weight: Tensor, curvature: Curvature, settings: Settings, grid: Grid | None = None) -> Solution:
    """Codes and grid of a weight [N, K] for inputs of this curvature. The weight is not changed.

    grid: to round to, its groups in the order of columns that groups are runs of; None chooses it by the settings.
    The result does not depend on the scale of the Hessian. Columns whose input is always 0 become 0. Rows do not depend
    on each other, so weights with the same inputs may be joined.
    """
    columns = weight.t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns[curvature.dead] = 0
    work = _Work(columns, curvature, settings, grid)
    losses = work.run(curvature.inverse)
    return Solution(work.codes_in_place(), work.grid(), curvature.order.index, losses)


def join(parts: Sequence[Solution]) -> Solution:
    """The solution of a weight from those of runs of its rows, for the same inputs."""
    grids = [part.grid for part in parts]
    scale, zero = torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids])
    return Solution(
        torch.cat([part.codes for part in parts]),
        replace(grids[0], scale=scale, zero=zero),
        parts[0].index,
        torch.cat([part.losses for part in parts]),
    )


def inverse_factor(hessian: Tensor, damp: float, step: float) -> tuple[Tensor, float]:
    """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1, and the damp that it took.

    hessian: [K, K] float32, symmetric; it is changed. With J for the reversal of the order, J H J = L L^T gives
    U = J L^-1 J: one factorization and one triangular inverse.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise HessianError("the Hessian holds NaN or inf; calibrate in bfloat16 or float32")
    mean, largest = float(diagonal.mean()), float(diagonal.max())
    added = 0.0
    for share, floor in _attempts(damp, step):
        wanted = share * mean + floor * largest
        diagonal += wanted - added
        added = wanted
        factor, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if int(info) == 0:
            eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            return torch.linalg.solve_triangular(factor, eye, upper=False).flip(0, 1), share
        logger.info("the Hessian is not positive definite with damp %.3f; raising it", share)
    raise HessianError(
        "the Hessian has no inverse even with its mean added to the diagonal; give more calibration data"
    )


def _attempts(damp: float, step: float) -> list[tuple[float, float]]:
    """Shares of the mean and of the largest diagonal element to add, one after the other."""
    count = int((1 - damp) / step) if step > 0 else 0
    raised = [damp + i * step for i in range(count + 1)]
    return [(share, 0.0) for share in raised] + [(raised[-1], 1e-6 * 10**i) for i in range(_FLOORS)]


class _Work:
    """The state of one solution. columns: [K, N] float32 in the order of the solver, consumed as they are rounded."""

    def __init__(self, columns: Tensor, curvature: Curvature, settings: Settings, grid: Grid | None) -> None:
        self.settings, self.order = settings, curvature.order
        self.rounding = Integers(settings.bits) if settings.element is None else SmallFloats(settings.element)
        groups = -(-len(columns) // settings.group_size)
        self.scale, self.zero = columns.new_empty(2, groups, columns.shape[1])
        self.costs = curvature.inverse.diagonal().pow(-2) if settings.weighted else None
        self.is_fitted = settings.static_groups or grid is not None
        if grid is not None:
            self.scale.copy_(grid.scale.t())
            self.zero.copy_(grid.zero.t())
        elif settings.static_groups:
            self._fit(columns, range(groups), None if self.costs is None else self.order.back(self.costs))
        self.columns = self.order.rows(columns)
        self.codes = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
        self.group_of = self.order.groups if settings.static_groups else self.order.runs

    def run(self, inverse: Tensor) -> Tensor:
        """Round every column. Returns the losses of the rows [N]."""
        losses, count = self.columns.new_zeros(self.columns.shape[1]), len(self.columns)
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            if not self.is_fitted:
                size = self.settings.group_size
                self._fit(self.columns, range(-(-start // size), -(-end // size)), self.costs)
            with threads.one_cpu_thread():
                errors = self._block(start, end, inverse)
            self.columns[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
            losses += errors.square_().sum(0).div_(2)
        return losses

    def grid(self) -> Grid:
        """The grids in the order in which groups are stored."""
        order = slice(None) if self.settings.static_groups else self.order.group_places
        scale, zero = self.scale[order].t(), self.zero[order].t()
        return Grid(scale, zero, self.settings.group_size, self.settings.bits)

    def codes_in_place(self) -> Tensor:
        """Codes [N, K] in the order of the weight."""
        return self.order.back(self.codes).t()

    def _block(self, start: int, end: int, inverse: Tensor) -> Tensor:
        """Round the columns from start to end; returns their errors [end - start, N]."""
        errors = torch.empty_like(self.columns[start:end])
        for first in range(start, end, _INNER):
            last = min(first + _INNER, end)
            part = errors[first - start : last - start]
            self._inner(self.columns[first:last], inverse[first:last, first:last], part, first)
            self.columns[last:end].addmm_(inverse[first:last, last:end].t(), part, alpha=-1)
        return errors

    def _inner(self, columns: Tensor, inverse: Tensor, errors: Tensor, first: int) -> None:
        diagonal = inverse.diagonal().tolist()
        for i, column in enumerate(columns):
            group = self.group_of[first + i]
            scale, zero = self.scale[group], self.zero[group]
            value = self.rounding.nearest(column, scale, zero, self.codes[first + i])
            error = torch.sub(column, value, out=errors[i]).div_(diagonal[i])
            columns[i + 1 :].addcmul_(inverse[i, i + 1 :, None], error, value=-1)

    def _fit(self, columns: Tensor, groups: range, costs: Tensor | None) -> None:
        """Choose the grids of these groups from columns as they are now; costs: [K] in the same order."""
        if not groups:
            return
        size = self.settings.group_size
        part = slice(groups.start * size, groups.stop * size)
        scale, zero = fit_groups(columns[part], size, self.settings, None if costs is None else costs[part])
        self.scale[groups.start : groups.stop], self.zero[groups.start : groups.stop] = scale, zero
