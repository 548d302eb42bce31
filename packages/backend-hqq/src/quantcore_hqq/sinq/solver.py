"""The SINQ solver: Sinkhorn's iteration on the deviations of rows and columns, rounding, and the search of A-SINQ.

A weight is read in float16, as sinq does on every device, and solved in float32, strip by strip. The iteration has no
single fixed point: rows times c and columns over c say the same. Its last steps are nearly equal, and which of them is
the best depends on the last bit of exp and log, which processors round differently: codes do not depend on it, scales
of rows and columns do, by a common factor.

Source: arXiv:2509.22944, algorithm 1, in the order of operations of sinq 0.2.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantcore.sdk import threads
from quantcore_hqq.hqq.shrinkage import shrink as shrink_error
from quantcore_hqq.sinq.levels import LEVELS, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from quantcore_hqq.sinq.config import Variant

STEPS = 16
MOST_KURTOSIS = 5.0  # of weights that are normalised; heavier tails are rounded as they are
_LIMITS = (1e-3, 1e3)  # of deviations
_STEP_LIMITS = (0.7, 2.0)  # of what a step multiplies a scale by
_LOG_LIMITS = (-0.3, 10.0)
_LEAST_RANGE = 1e-4
_ALPHAS = 20
_LEAST_INPUT = 1e-4
_REFINING_STEPS = 20


class Solved(NamedTuple):
    """codes: [T, n, g] uint8. scale, zero: [T, n, 1] float16; zero may be [1, 1, 1]. column_scale: [T, 1, g] float16.

    T tiles of n rows and g columns, those of the first rows first.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    column_scale: Tensor


def solve(
    weight: Tensor, *, bits: float, tile: tuple[int, int], variant: Variant, inputs: Tensor | None = None
) -> Solved:
    """Codes and scales with which `(value of a code - zero) * scale * column_scale` is near the weight.

    weight: [N, K], any float dtype. tile: rows and columns of one, which divide N and K. inputs: [K] float16, scales of
    the inputs that A-SINQ chose; None for none.
    Raises ValueError for a weight that float16 does not hold.
    """
    half = weight.detach().to(torch.float16)
    if not bool(half.isfinite().all()):
        raise ValueError(
            "the weight holds values beyond 65504, which SINQ reads as infinite; scale it, or leave it float"
        )
    top = round(2**bits - 1)
    is_plain = kurtosis(half) > MOST_KURTOSIS
    inputs = None if is_plain else inputs
    with threads.one_cpu_thread():
        tiles = _evened(half, tile, variant, is_plain)
        parts = [_solve_tile(each, top, variant, inputs) for each in tiles]
    codes, scale, zero, column_scale = (torch.stack(each) for each in zip(*parts, strict=True))
    return Solved(codes, scale, zero[:1, :1] if variant.is_symmetric else zero, column_scale)


def kurtosis(weight: Tensor) -> float:
    """The fourth moment of a whole matrix over the square of its second."""
    squares = (weight.float() - weight.float().mean()).square_()
    second = squares.mean().clamp(min=1e-6)
    return float(squares.square_().mean() / second.square())


def sinkhorn(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows [n, 1] and of columns [1, g], by which values [n, g] float32 are divided to be even."""
    low, high = _LIMITS
    log_columns, log_rows = values.new_zeros(1, values.shape[1]), values.new_zeros(values.shape[0], 1)
    rows, columns = _deviations(values)
    target = torch.minimum(rows.clamp(low, high).min(), columns.clamp(low, high).min()) + 1e-6
    best, kept = _imbalance(rows, columns), (log_rows.exp(), log_columns.exp())
    for _ in range(STEPS):
        of_rows, of_columns = log_rows.exp(), log_columns.exp()
        rows, columns = _deviations(values / of_columns / of_rows)
        found = _imbalance(rows, columns)
        if found > best:
            break  # sinq goes on, but no scale changes any more
        best, kept = found, (of_rows, of_columns)
        log_columns = _step(log_columns, columns, target)
        log_rows = _step(log_rows, rows, target)
    return kept


class Search:
    """The input scales that A-SINQ tries for a weight, those with which the layer's output is nearest what it was.

    Errors of several parts of the inputs may be added up before the best is taken.
    Source: Lin et al. 2023, AWQ (arXiv:2306.00978), section 3.2, on weights that Sinkhorn's iteration made even.
    """

    def __init__(self, weight: Tensor, mean: Tensor, *, bits: float, tile: tuple[int, int], variant: Variant) -> None:
        """mean: [K] float, of |x| for each input over all that the layer sees."""
        self._weight = weight.detach().to(torch.float16)
        self._top, self._variant = round(2**bits - 1), variant
        self.is_plain = kurtosis(self._weight) > MOST_KURTOSIS
        self._tiles = list(_evened(self._weight, tile, variant, self.is_plain))
        self._candidates = list(_candidates(self._weight, mean))

    def errors(self, x: Tensor) -> Tensor:
        """The sum of errors of the outputs for inputs [tokens, K] under each candidate, [20] float32."""
        return torch.stack([self._error(x.to(torch.float16).float(), scale) for scale in self._candidates])

    def best(self, errors: Tensor) -> Tensor | None:
        """The candidate [K] float16 of the least error, the first of several; None for weights that take no scales."""
        return None if self.is_plain else self._candidates[int(errors.argmin())].to(torch.float16)

    def _error(self, x: Tensor, inputs: Tensor) -> Tensor:
        difference = self._weight.float().neg_()
        for tile in self._tiles:
            part, own = difference[tile.rows, tile.columns], inputs[tile.columns]
            codes, scale, zero = _round(tile.values * own, self._top, self._variant)
            rounded = (_values_of(codes, self._variant, scale) - zero) * scale
            part.add_(rounded / own * tile.of_rows * tile.of_columns)
        outputs = x @ difference.t()
        return outputs.abs_().sum() if self._variant.by_absolute else outputs.square_().sum()


def _candidates(weight: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Scales of inputs [K] for each exponent from 0 to 0.95. mean: of |x| for each input."""
    of_weight = weight.float().abs().mean(0)
    for step in range(_ALPHAS):
        alpha = step / _ALPHAS
        scale = mean.float().pow(alpha).clamp(min=_LEAST_INPUT)
        scale = (scale / (of_weight.pow(1 - alpha) + 1e-4)).clamp(min=_LEAST_INPUT)
        yield scale / (scale.max() * scale.min()).sqrt()


class _Tile(NamedTuple):
    """values [n, g] float32, divided by scales of rows [n, 1] and columns [1, g], and where they stand."""

    values: Tensor
    of_rows: Tensor
    of_columns: Tensor
    rows: slice
    columns: slice


def _evened(weight: Tensor, tile: tuple[int, int], variant: Variant, is_plain: bool) -> Iterator[_Tile]:
    """The tiles of a weight, made even, those of the first rows first."""
    for row in range(0, weight.shape[0], tile[0]):
        for column in range(0, weight.shape[1], tile[1]):
            rows, columns = slice(row, row + tile[0]), slice(column, column + tile[1])
            values = weight[rows, columns].float().contiguous()
            of_rows, of_columns = sinkhorn(values) if variant.normalizes and not is_plain else _ones(values)
            yield _Tile(values / of_columns / of_rows, of_rows, of_columns, rows, columns)


def _solve_tile(tile: _Tile, top: int, variant: Variant, inputs: Tensor | None) -> tuple[Tensor, ...]:
    values, of_columns = tile.values, tile.of_columns
    if inputs is not None:
        own = inputs[tile.columns]
        values, of_columns = values * own, of_columns / own
    codes, scale, zero = _round(values, top, variant)
    half = torch.float16
    return codes, (scale * tile.of_rows).to(half), zero.to(half), of_columns.to(half)


def _round(values: Tensor, top: int, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [n, g], and scale and zero [n, 1] float32 of the rows of a tile."""
    if variant.levels is not None:
        return _round_to_levels(values, LEVELS[variant.levels])
    return _round_evenly(values, top) if variant.is_symmetric else _round_to_range(values, top, variant.refines)


def _round_to_range(values: Tensor, top: int, refines: bool) -> tuple[Tensor, Tensor, Tensor]:
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = (high - low).clamp_(min=_LEAST_RANGE) / top
    zero = (low / scale).round_().neg_()
    if refines:
        zero = _refined(values, scale, zero, top)
    return (values / scale).add_(zero).round_().clamp_(0, top).to(torch.uint8), scale, zero


def _round_evenly(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    middle = top // 2
    scale = values.abs().amax(1, keepdim=True).clamp_(min=1e-5) / (middle - 1)
    codes = (values / scale).round_().clamp_(-middle, middle - 1).add_(middle)
    return codes.to(torch.uint8), scale, torch.full_like(scale, middle)


def _round_to_levels(values: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    mean = values.mean(1, keepdim=True)
    scale = (values - mean).abs().amax(1, keepdim=True).clamp_(min=_LEAST_RANGE)
    zero = -mean / scale
    return nearest(values / scale + zero, levels), scale, zero


def _refined(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """HQQ's half-quadratic steps on the zeros of a tile; those of the step with the least error."""
    best, kept = float("inf"), zero
    for _ in range(_REFINING_STEPS):
        codes = (values / scale).add_(zero).round_().clamp_(0, top)
        residual = values - (codes - zero) * scale
        magnitude = residual.abs()
        error = float(magnitude.mean())
        if not error < best:
            break
        best, kept = error, zero
        zero = (codes - (values - shrink_error(residual, magnitude)) / scale).mean(1, keepdim=True)
    return kept


def _values_of(codes: Tensor, variant: Variant, scale: Tensor) -> Tensor:
    if variant.levels is None:
        return codes.to(scale.dtype)
    return torch.tensor(LEVELS[variant.levels], dtype=scale.dtype, device=codes.device)[codes.int()]


def _ones(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_ones(values.shape[0], 1), values.new_ones(1, values.shape[1])


def _deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [n, 1] and each column [1, g]; 0 for those of a single value."""
    return _deviation(values, 1), _deviation(values, 0)


def _deviation(values: Tensor, axis: int) -> Tensor:
    if values.shape[axis] > 1:
        return values.std(axis, keepdim=True)
    return torch.zeros_like(values.narrow(axis, 0, 1))


def _imbalance(rows: Tensor, columns: Tensor) -> Tensor:
    most, least = torch.maximum(rows.max(), columns.max()), torch.minimum(rows.min(), columns.min())
    return most / least.clamp(min=1e-12)


def _step(log_scale: Tensor, deviation: Tensor, target: Tensor) -> Tensor:
    return (log_scale + (deviation.clamp(*_LIMITS) / target).clamp(*_STEP_LIMITS).log()).clamp_(*_LOG_LIMITS)
