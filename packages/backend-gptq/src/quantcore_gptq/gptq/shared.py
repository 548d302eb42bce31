"""GPTQ on the formats of other methods: their scales and zero points, with codes that GPTQ chooses.

The scales are those of rounding to nearest, fixed before the first column is rounded, as llm-compressor has it. Weights
that are stored under a transform are solved under it, for inputs that it was applied to.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcore.sdk import Affine, ColumnGroups, ScaledFloat, statistics
from quantcore_gptq.gptq.pieces import share, solve_pieces
from quantcore_gptq.gptq.settings import Settings
from quantcore_gptq.gptq.solver import Curvature, Solution, curvature
from quantcore_gptq.rounding import Grid

if TYPE_CHECKING:
    from quantcore.sdk import Block, PlannedLayer, WeightFormat

ORDERS = (None, "static", "group")
FAMILIES = ("affine", "scaled_float")
_DAMP_STEP = 0.01


@dataclass(frozen=True)
class Options:
    """How one layer is solved.

    order: of columns: None as they stand, "static" large inputs first in the groups that the columns have, "group" also
    grouped in that order, for formats that store the group of each column. damp: as `Settings.damp`.
    """

    order: str | None = None
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r:.40} must be one of {', '.join(map(repr, ORDERS))}")
        if not 0 < self.damp < 1:
            raise ValueError(f"damp {self.damp} must lie between 0 and 1")


def solve_block(block: Block, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Solve the layers of a block on the scales of their own formats; see `quantcore.sdk.SharedSolver`."""
    chosen = {name: Options(**options.get(name, {})) for name in block.layers}
    for names in (turn for stage in block.stages() for turn in block.turns(stage)):
        solved = [name for name in names if _stored_format(block.layers[name]).solved_family in FAMILIES]
        for name in set(names) - set(solved):
            block.round_to_nearest(name, "its format has no integer codes, nor small floats that a solver may choose")
        found = block.collect(solved, lambda layer: statistics.Hessian(layer.dense.shape[1], layer.dense.weight.device))
        left = [name for name in found if not block.round_if_unseen(name, found[name])]
        units = _joined(block, left, found, chosen)
        share(block, units, _solver(block, found, chosen))


def _solver(
    block: Block, found: Mapping[str, statistics.Hessian], options: Mapping[str, Options]
) -> Callable[[Sequence[str], bool], None]:
    """What solves layers with the same inputs, format and options; see `share`."""

    def solve(names: Sequence[str], is_shared: bool) -> None:
        _solve_together(block, names, found[names[0]].matrix(), options[names[0]], is_shared=is_shared)

    return solve


def _joined(
    block: Block, names: Sequence[str], found: Mapping[str, statistics.Hessian], options: Mapping[str, Options]
) -> list[list[str]]:
    """The names in groups with the same inputs, format and options."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        groups[id(found[name]), block.layers[name].weight_format, options[name]].append(name)
    return list(groups.values())


@dataclass(frozen=True)
class _Nearest:
    """A layer rounded to nearest. weight: [N, K], as it is stored but for rounding. tensors: what its format stores."""

    layer: PlannedLayer
    weight: Tensor
    tensors: Mapping[str, Tensor]
    family: Affine | ScaledFloat

    @classmethod
    def of(cls, layer: PlannedLayer, weight: Tensor) -> _Nearest:
        plain = _stored_format(layer)
        tensors = plain.quantize(weight)
        family = plain.solver_grid(tensors, layer.dense.shape)
        assert isinstance(family, Affine | ScaledFloat)
        return cls(layer, weight, tensors, family)


def _stored_format(layer: PlannedLayer) -> WeightFormat:
    """The format of a layer's weight as it is stored, under any transform."""
    return layer.weight_format.untransformed()


def _solve_together(block: Block, names: Sequence[str], hessian: Tensor, options: Options, *, is_shared: bool) -> None:
    """Put the solution of layers of one format in place; hessian [K, K] of their common inputs is overwritten.

    is_shared: whether each process solves some of the rows.
    """
    layers = [block.layers[name] for name in names]
    transform, own = layers[0].weight_format.transform, {}
    weights = [layer.dense.weight for layer in layers]
    if transform is not None:
        own = transform.create(hessian.shape[0], hessian.device)
        hessian = transform.apply(transform.apply(hessian, own).t(), own)  # M^T H M, for inputs x M
        weights = [transform.absorb(weight.float(), own) for weight in weights]
    nearest = [_Nearest.of(layer, weight) for layer, weight in zip(layers, weights, strict=True)]
    try:
        settings = _settings(nearest[0].family, options)
        shared = curvature(hessian.contiguous(), settings)
    except ValueError as error:  # no inverse, or groups that are no runs of columns
        for name in names:
            block.round_to_nearest(name, str(error))
        return
    if options.order == "group":
        nearest = [_Nearest.of(each.layer, _turned(each.weight, shared)) for each in nearest]
    grid = _grid([each.family for each in nearest], settings)
    solution = solve_pieces(block, torch.cat(weights), shared, settings, grid, is_shared=is_shared)
    first = 0
    for each in nearest:
        last = first + each.layer.dense.shape[0]
        _put(block, each, own, solution, slice(first, last))
        first = last


def _turned(weight: Tensor, shared: Curvature) -> Tensor:
    """The columns of a weight [N, K] in the order of a solution."""
    return shared.order.rows(weight.t()).t().contiguous()


def _settings(nearest: Affine | ScaledFloat, options: Options) -> Settings:
    """Raises ValueError where groups of columns are no runs of one length."""
    element = nearest.element if isinstance(nearest, ScaledFloat) else None
    if element is not None and options.order == "group":
        raise ValueError("order 'group' stores the group of each column, which formats of small floats do not")
    index = nearest.by_columns()[-1]
    size = int((index == index[0]).sum())
    nearest.by_column_runs(size)
    return Settings(
        bits=int(nearest.bits),
        group_size=size,
        desc_act=options.order is not None,
        static_groups=options.order != "group",
        damp=options.damp,
        damp_step=_DAMP_STEP,
        element=element,
    )


def _grid(nearest: Sequence[Affine | ScaledFloat], settings: Settings) -> Grid:
    scales, zeros = zip(*(_runs(each, settings.group_size) for each in nearest), strict=True)
    return Grid(torch.cat(scales), torch.cat(zeros), settings.group_size, settings.bits)


def _runs(nearest: Affine | ScaledFloat, size: int) -> tuple[Tensor, Tensor]:
    """scale and zero [N, ceil(K / size)] of runs of columns."""
    if isinstance(nearest, Affine):
        return nearest.by_column_runs(size)
    scale = nearest.by_column_runs(size)
    return scale, torch.zeros_like(scale)


def _put(block: Block, nearest: _Nearest, own: Mapping[str, Tensor], solution: Solution, rows: slice) -> None:
    """Replace a layer by the rows of a solution that are its own. own: the tensors of its transform."""
    layer = nearest.layer
    solved = dataclasses.replace(nearest.family, codes=solution.codes[rows].contiguous())
    if solution.index is not None and isinstance(solved, Affine):
        scale, zero, _ = solved.by_columns()
        grouping = ColumnGroups(solution.index, scale.shape[1])
        solved = dataclasses.replace(solved, scale=scale.reshape(-1), zero=zero.reshape(-1), grouping=grouping)
    weight_format = layer.weight_format.for_family(solved)
    tensors = {**weight_format.untransformed().store_solved(nearest.tensors, solved), **own}
    loss = float(solution.losses[rows].sum())
    block.replace(layer.name, tensors, weight_format=weight_format, loss=loss, method="gptq")
