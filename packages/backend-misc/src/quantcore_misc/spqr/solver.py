"""Codes, scales and outliers of one layer.

Columns are solved one after the other as in GPTQ. Weights whose error would cost most are outliers: they leave their
group before its scale is chosen, and are stored beside it.
Source: Dettmers et al. 2023, SpQR, sections 3 and 4, algorithm 1 (arXiv:2306.03078).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore_misc.spqr.format import TILE, Dense, pack, pack_order, pack_outliers

_LEVELS = 7
_THRESHOLD = 0.2  # of an outlier's cost, in units of the mean cost of a weight; upstream's published setting
_DAMP = 1.0  # of the mean diagonal of the curvature; likewise
_BLOCK = 128
_TINY = 1e-9
_MOST_ZERO = 1024.0


@dataclass
class _Grid:
    """Scales and zeros of a group of columns, as they are stored and as they read, of rows in whole tiles."""

    scale_codes: Tensor  # [R, 16]
    zero_codes: Tensor
    second: Tensor  # [R, 4] float16
    scale: Tensor  # [N, 1] float32
    zero: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """Codes [N, c] of values [N, c], float32."""
        return (values / self.scale.clamp(min=_TINY) + self.zero).round_().clamp_(0, _LEVELS)

    def values(self, codes: Tensor) -> Tensor:
        """Values [N, c] of codes, with the roundings of the stored form."""
        return (self.scale.half() * (codes.half() - self.zero.half())).float()


def solve(weight: Tensor, hessian: Tensor | None) -> tuple[dict[str, Tensor], float | None]:
    """The stored tensors of a weight [N, K], and their loss relative to the weight's.

    hessian: [K, K] float32, the curvature of the layer's squared output error; None rounds each weight by itself.
    """
    N, K = weight.shape
    order = torch.arange(K, device=weight.device)
    upper = None
    if hessian is not None:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        upper = _upper_factor(hessian[order][:, order])
    values = torch.nn.functional.pad(weight.float()[:, order], (0, -K % TILE, 0, -N % TILE), value=0.0)
    dense, outliers = _solve_columns(values, K, upper)
    found = dense.values().float()
    # What is stored is added to the dense value, so it is what the outlier is more than that.
    is_outlier = ~outliers[:N, :K].isnan()
    rows, columns = is_outlier.nonzero(as_tuple=True)
    entries = pack_outliers(columns, (outliers[:N, :K] - found[:N, :K])[rows, columns])
    offsets = torch.zeros(N + 1, dtype=torch.int32, device=weight.device)
    offsets[1:] = is_outlier.sum(1).cumsum(0)
    tensors = {
        "dense_weights": pack(dense),
        "row_offsets": offsets,
        "col_vals": entries,
        "in_perm": pack_order(order),
    }
    return tensors, _loss(tensors, weight, hessian)


def _solve_columns(values: Tensor, columns: int, upper: Tensor | None) -> tuple[Dense, Tensor]:
    """The dense part of values [R * 16, C * 16], and outliers by their values, NaN elsewhere.

    columns: the number of those that are no padding. upper: [columns, columns], the factor of the inverse curvature.
    """
    factors = torch.ones(columns, device=values.device) if upper is None else upper.diagonal()
    threshold = _THRESHOLD * (values[:, :columns].var(dim=0) / factors.square()).mean()
    outliers, codes = torch.full_like(values, torch.nan), torch.zeros_like(values, dtype=torch.int64)
    grids = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = values.new_zeros(values.shape[0], stop - start)
        for column in range(start, stop):
            if column % TILE == 0:
                group = slice(column, min(column + TILE, columns))
                grids.append(_fit(_without_outliers(values[:, group], factors[group], threshold)))
            own, grid = values[:, column, None], grids[-1]
            code = grid.codes(own)
            error = (own - grid.values(code)) / factors[column]
            is_outlier = error.square() > threshold
            outliers[:, column] = torch.where(is_outlier, own, torch.nan)[:, 0]
            codes[:, column] = torch.where(is_outlier, grid.codes(torch.zeros_like(own)), code)[:, 0].long()
            if upper is not None:
                errors[:, column - start] = torch.where(is_outlier, 0.0, error)[:, 0]
                values[:, column + 1 : stop] -= errors[:, column - start, None] * upper[column, column + 1 : stop]
        if upper is not None:
            values[:, stop:columns] -= errors @ upper[start:stop, stop:]
    parts = (torch.stack([getattr(grid, name) for grid in grids], dim) for name, dim in _STACKED)
    return Dense(codes.view(-1, TILE, values.shape[1] // TILE, TILE), *parts), outliers


_STACKED = (("scale_codes", 2), ("zero_codes", 2), ("second", 1))


def _without_outliers(group: Tensor, factors: Tensor, threshold: Tensor) -> Tensor:
    """The columns [N, c] of a group with its likely outliers replaced by the mean of the others.

    A likely outlier is a weight without which the rest of its group would cost so much less.
    """
    cost = _cost(group[:, None], factors).squeeze(1)
    rest = ~torch.eye(group.shape[1], dtype=torch.bool, device=group.device)
    without = _cost(group[:, None].expand(-1, group.shape[1], -1), factors, rest)
    is_outlier = cost[:, None] - without > threshold
    others = (~is_outlier).sum(1, keepdim=True)
    mean = group.masked_fill(is_outlier, 0).sum(1, keepdim=True) / others.clamp(min=1)
    return torch.where(is_outlier & (others > 0), mean, group)


def _cost(group: Tensor, factors: Tensor, counted: Tensor | None = None) -> Tensor:
    """The cost [N, p] of groups [N, p, c] under scales of their own. counted: [p, c], the columns of each."""
    low = group if counted is None else group.masked_fill(~counted, torch.inf)
    high = group if counted is None else group.masked_fill(~counted, -torch.inf)
    scale, zero = _range_grid(low.amin(-1, keepdim=True), high.amax(-1, keepdim=True))
    codes = (group / scale + zero).round_().clamp_(0, _LEVELS)
    cost = ((group - scale * (codes - zero)) / factors).square_()
    return (cost if counted is None else cost.masked_fill_(~counted, 0)).sum(-1)


def _fit(group: Tensor) -> _Grid:
    """Scales and zeros of columns [N, c], stored in 3 bits over the rows of each tile."""
    scale, zero = _range_grid(group.amin(1), group.amax(1))
    scale_codes, scale_second, scale = _store(scale.view(-1, TILE))
    zero_codes, zero_second, zero = _store(zero.view(-1, TILE))
    second = torch.stack((scale_second[0], zero_second[0], scale_second[1], zero_second[1]), -1)
    return _Grid(scale_codes, zero_codes, second, scale.view(-1, 1), zero.view(-1, 1))


def _range_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of codes that reach from low to high, and to 0; those of -1 to 1 where there is nothing but 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    is_zero = low == high
    scale = torch.where(is_zero, 2 / _LEVELS, (high - low) / _LEVELS)
    return scale, torch.where(is_zero, _LEVELS / 2, -low / scale)


def _store(numbers: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Codes [R, 16] int64 of numbers [R, 16], their scale and zero [R] float16, and what they read as, float32."""
    low, high = numbers.amin(1, keepdim=True), numbers.amax(1, keepdim=True)
    span = ((high - low) / _LEVELS).half()
    # Where numbers are nearly equal, a zero in units of their span would be too large for float16: all get the least.
    is_flat = span.float() * _MOST_ZERO <= low.abs()
    scale = torch.where(is_flat, 1, span)
    zero = (-low / scale.float()).half()
    codes = (numbers / scale.float() + zero.float()).round_().clamp_(0, _LEVELS)
    return codes.long(), (scale[:, 0], zero[:, 0]), (scale * (codes.half() - zero)).float()


def _upper_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a curvature, damped; inputs that are always zero count as 1."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMP * diagonal.mean()
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return factor.float()


def _loss(tensors: dict[str, Tensor], weight: Tensor, hessian: Tensor | None) -> float | None:
    if hessian is None:
        return None
    from quantcore_misc.spqr.format import Spqr

    weight = weight.float()
    error = Spqr().dequantize(tensors, tuple(weight.shape), torch.float32) - weight
    size = (weight @ hessian).mul_(weight).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    return float((error @ hessian).mul_(error).sum() / size)
