"""The SINQ solver: Sinkhorn's iteration on the deviations of rows and columns, rounding, and the search of A-SINQ.

A weight is read in float16, as sinq does on every device, and solved in float32, many tiles at once. The iteration has
no single fixed point: rows times c and columns over c say the same. Its last steps are nearly equal, and which of them
is the best depends on the last bit of exp and log, which processors round differently: codes do not depend on it,
scales of rows and columns do, by a common factor.

Source: arXiv:2509.22944, algorithm 1, in the order of operations of sinq 0.2.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
_ON_CPU, _ELSEWHERE = 1 << 18, 1 << 24  # weights solved at once: what a core's cache holds, what fills a GPU


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
    grid = _grid(half, tile)
    codes = torch.empty(grid.shape, dtype=torch.uint8, device=half.device)
    scale, zero = (half.new_empty(*grid.shape[:3], 1) for _ in range(2))
    column_scale = half.new_empty(*grid.shape[:2], 1, grid.shape[3])

    def work(part: _Part) -> None:
        values, of_rows, of_columns = _evened(grid[part], variant, is_plain)
        if inputs is not None:
            own = _of_tiles(inputs, grid)[:, part[1]]
            values, of_columns = values * own, of_columns / own
        codes[part], of_range, zero[part] = _round(values, top, variant)
        scale[part], column_scale[part] = of_range * of_rows, of_columns

    _in_parts(work, grid)
    found = Solved(*(each.flatten(0, 1) for each in (codes, scale, zero, column_scale)))
    return found._replace(zero=found.zero[:1, :1]) if variant.is_symmetric else found


def kurtosis(weight: Tensor) -> float:
    """The fourth moment of a whole matrix over the square of its second."""
    squares = (weight.float() - weight.float().mean()).square_()
    second = squares.mean().clamp(min=1e-6)
    return float(squares.square_().mean() / second.square())


def sinkhorn(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of rows [..., n, 1] and of columns [..., 1, g] that make tiles [..., n, g] float32 even, divided by them.

    Each tile is as if it were alone.
    """
    low, high = _LIMITS
    rows, columns = _deviations(values)
    log_columns, log_rows = torch.zeros_like(columns), torch.zeros_like(rows)
    target = torch.minimum(_least(rows.clamp(low, high)), _least(columns.clamp(low, high))) + 1e-6
    best, kept = _imbalance(rows, columns), (log_rows.exp(), log_columns.exp())
    is_done = torch.zeros_like(best, dtype=torch.bool)
    for _ in range(STEPS):
        of_rows, of_columns = log_rows.exp(), log_columns.exp()
        rows, columns = _deviations(values / of_columns / of_rows)
        found = _imbalance(rows, columns)
        is_done |= found > best  # sinq goes on, but no scale of this tile changes any more
        if bool(is_done.all()):
            break
        best = torch.where(is_done, best, found)
        kept = torch.where(is_done, kept[0], of_rows), torch.where(is_done, kept[1], of_columns)
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
        self._tile, grid = tile, _grid(self._weight, tile)
        self._values = torch.empty(grid.shape, device=weight.device)
        self._of_rows = self._values.new_empty(*grid.shape[:3], 1)
        self._of_columns = self._values.new_empty(*grid.shape[:2], 1, grid.shape[3])

        def even(part: _Part) -> None:
            found = _evened(grid[part], variant, self.is_plain)
            self._values[part], self._of_rows[part], self._of_columns[part] = found

        _in_parts(even, grid)
        self._candidates = list(_candidates(self._weight, mean))

    def errors(self, x: Tensor) -> Tensor:
        """The sum of errors of the outputs for inputs [tokens, K] under each candidate, [20] float32."""
        return torch.stack([self._error(x.to(torch.float16).float(), scale) for scale in self._candidates])

    def best(self, errors: Tensor) -> Tensor | None:
        """The candidate [K] float16 of the least error, the first of several; None for weights that take no scales."""
        return None if self.is_plain else self._candidates[int(errors.argmin())].to(torch.float16)

    def _error(self, x: Tensor, inputs: Tensor) -> Tensor:
        difference = self._weight.float().neg_()
        grid = _grid(difference, self._tile)

        def add(part: _Part) -> None:
            own = _of_tiles(inputs, grid)[:, part[1]]
            codes, scale, zero = _round(self._values[part] * own, self._top, self._variant)
            rounded = (_values_of(codes, self._variant, scale) - zero) * scale
            grid[part].add_(rounded / own * self._of_rows[part] * self._of_columns[part])

        _in_parts(add, grid)
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


_Part = tuple[slice, slice]  # of the rows of tiles, and of the tiles in a row


def _grid(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """A view of [N, K] as tiles, [N / n, K / g, n, g]."""
    down, across = (size // part for size, part in zip(weight.shape, tile, strict=True))
    return weight.view(down, tile[0], across, tile[1]).transpose(1, 2)


def _in_parts(work: Callable[[_Part], None], grid: Tensor) -> None:
    """Calls work for parts of a grid of tiles that are small enough to be held in float32 several times."""
    down, across, *tile = grid.shape
    limit = max(1, (_ON_CPU if grid.device.type == "cpu" else _ELSEWHERE) // math.prod(tile))  # tiles
    wide, high = min(across, limit), max(1, limit // across)
    rows, columns = (range(0, down, high), range(0, across, wide))
    threads.share_out(work, ((slice(r, r + high), slice(c, c + wide)) for r in rows for c in columns), grid.device)


def _evened(tiles: Tensor, variant: Variant, is_plain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles [..., n, g] float32 made even, and the scales of their rows and columns that they were divided by."""
    values = tiles.float().contiguous()
    of_rows, of_columns = sinkhorn(values) if variant.normalizes and not is_plain else _ones(values)
    return values / of_columns / of_rows, of_rows, of_columns


def _of_tiles(inputs: Tensor, grid: Tensor) -> Tensor:
    """Scales of inputs [K] as those of each tile, [1, K / g, 1, g]."""
    return inputs.view(1, grid.shape[1], 1, grid.shape[3])


def _round(values: Tensor, top: int, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [..., n, g], and scale and zero [..., n, 1] float32 of the rows of tiles."""
    if variant.levels is not None:
        return _round_to_levels(values, LEVELS[variant.levels])
    return _round_evenly(values, top) if variant.is_symmetric else _round_to_range(values, top, variant.refines)


def _round_to_range(values: Tensor, top: int, refines: bool) -> tuple[Tensor, Tensor, Tensor]:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (high - low).clamp_(min=_LEAST_RANGE) / top
    zero = (low / scale).round_().neg_()
    if refines:
        zero = _refined(values, scale, zero, top)
    return (values / scale).add_(zero).round_().clamp_(0, top).to(torch.uint8), scale, zero


def _round_evenly(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    middle = top // 2
    scale = values.abs().amax(-1, keepdim=True).clamp_(min=1e-5) / (middle - 1)
    codes = (values / scale).round_().clamp_(-middle, middle - 1).add_(middle)
    return codes.to(torch.uint8), scale, torch.full_like(scale, middle)


def _round_to_levels(values: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    mean = values.mean(-1, keepdim=True)
    scale = (values - mean).abs().amax(-1, keepdim=True).clamp_(min=_LEAST_RANGE)
    zero = -mean / scale
    return nearest(values / scale + zero, levels), scale, zero


def _refined(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """HQQ's half-quadratic steps on the zeros of tiles; of each tile those of the step with the least error."""
    kept, best = zero, values.new_full((*values.shape[:-2], 1, 1), float("inf"))
    is_going = torch.ones_like(best, dtype=torch.bool)
    for _ in range(_REFINING_STEPS):
        codes = (values / scale).add_(zero).round_().clamp_(0, top)
        residual = values - (codes - zero) * scale
        magnitude = residual.abs()
        error = magnitude.mean((-2, -1), keepdim=True)
        is_going &= error < best
        if not bool(is_going.any()):
            break
        best, kept = torch.where(is_going, error, best), torch.where(is_going, zero, kept)
        zero = (codes - (values - shrink_error(residual, magnitude)) / scale).mean(-1, keepdim=True)
    return kept


def _values_of(codes: Tensor, variant: Variant, scale: Tensor) -> Tensor:
    if variant.levels is None:
        return codes.to(scale.dtype)
    return torch.tensor(LEVELS[variant.levels], dtype=scale.dtype, device=codes.device)[codes.int()]


def _ones(values: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(values[..., :1]), torch.ones_like(values[..., :1, :])


def _deviations(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [..., n, 1] and each column [..., 1, g], as torch.std's; 0 for those of a single value.

    In two passes of float64, which round to the same float32 as torch's single pass of it and take a quarter as long.
    """
    exact = values.double()
    return _deviation(exact, -1).float(), _deviation(exact, -2).float()


def _deviation(values: Tensor, axis: int) -> Tensor:
    count = values.shape[axis]
    squares = (values - values.mean(axis, keepdim=True)).square_().sum(axis, keepdim=True)
    return squares.div_(max(1, count - 1)).sqrt_()


def _imbalance(rows: Tensor, columns: Tensor) -> Tensor:
    """Of each tile, [..., 1, 1]."""
    most = torch.maximum(rows.amax((-2, -1), keepdim=True), columns.amax((-2, -1), keepdim=True))
    return most / torch.minimum(_least(rows), _least(columns)).clamp(min=1e-12)


def _least(values: Tensor) -> Tensor:
    return values.amin((-2, -1), keepdim=True)


def _step(log_scale: Tensor, deviation: Tensor, target: Tensor) -> Tensor:
    return (log_scale + (deviation.clamp(*_LIMITS) / target).clamp(*_STEP_LIMITS).log()).clamp_(*_LOG_LIMITS)
