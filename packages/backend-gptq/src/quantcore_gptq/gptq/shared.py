"""GPTQ on the affine formats of other methods: their scales and zero points, with codes that GPTQ chooses.

The scales are those of rounding to nearest, fixed before the first column is rounded, as llm-compressor has it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantcore.calibration.statistics import Hessian
from quantcore.formats.families import Affine, ColumnGroups
from quantcore_gptq.gptq.solver import Curvature, Settings, Solution, curvature, solve
from quantcore_gptq.rounding import Grid

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.quantizers.plan import PlannedLayer

ORDERS = (None, "static", "group")
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
    """Solve the layers of a block on the scales of their own formats; see `quantcore.calibration.solvers`."""
    chosen = {name: Options(**options.get(name, {})) for name in block.layers}
    for names in block.stages():
        affine = [name for name in names if block.layers[name].weight_format.family == "affine"]
        for name in set(names) - set(affine):
            block.round_to_nearest(name, "its format has no integer codes")
        found = block.collect(affine, lambda layer: Hessian(layer.dense.shape[1], layer.dense.weight.device))
        left = [name for name in found if not block.round_if_unseen(name, found[name])]
        for together in _joined(block, left, found, chosen):
            _solve_together(block, together, found[together[0]].matrix(), chosen[together[0]])


def _joined(
    block: Block, names: Sequence[str], found: Mapping[str, Hessian], options: Mapping[str, Options]
) -> list[list[str]]:
    """The names in groups with the same inputs, format and options."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in names:
        groups[id(found[name]), block.layers[name].weight_format, options[name]].append(name)
    return list(groups.values())


def _solve_together(block: Block, names: Sequence[str], hessian: Tensor, options: Options) -> None:
    """Put the solution of layers of one format in place; hessian [K, K] of their common inputs is overwritten."""
    layers = [block.layers[name] for name in names]
    affine = [_nearest(layer, layer.dense.weight) for layer in layers]
    try:
        settings = _settings(affine[0], options)
        shared = curvature(hessian, settings)
    except ValueError as error:  # no inverse, or groups that are no runs of columns
        for name in names:
            block.round_to_nearest(name, str(error))
        return
    if options.order == "group":
        affine = [_nearest(layer, _turned(layer.dense.weight, shared)) for layer in layers]
    weight = torch.cat([layer.dense.weight for layer in layers])
    solution = solve(weight, shared, settings, _grid(affine, settings))
    first = 0
    for layer, nearest in zip(layers, affine, strict=True):
        last = first + layer.dense.shape[0]
        _put(block, layer, nearest, solution, slice(first, last))
        first = last


def _nearest(layer: PlannedLayer, weight: Tensor) -> Affine:
    """A weight rounded to nearest by the layer's format."""
    family = layer.weight_format.lower(layer.weight_format.quantize(weight), layer.dense.shape)
    assert isinstance(family, Affine)
    return family


def _turned(weight: Tensor, shared: Curvature) -> Tensor:
    """The columns of a weight [N, K] in the order of a solution."""
    return shared.order.rows(weight.t()).t().contiguous()


def _settings(nearest: Affine, options: Options) -> Settings:
    """Raises ValueError where groups of columns are no runs of one length."""
    index = nearest.by_columns()[2]
    size = int((index == index[0]).sum())
    nearest.by_column_runs(size)
    return Settings(
        bits=int(nearest.bits),
        group_size=size,
        desc_act=options.order is not None,
        static_groups=options.order != "group",
        damp=options.damp,
        damp_step=_DAMP_STEP,
    )


def _grid(nearest: Sequence[Affine], settings: Settings) -> Grid:
    scales, zeros = zip(*(each.by_column_runs(settings.group_size) for each in nearest), strict=True)
    return Grid(torch.cat(scales), torch.cat(zeros), settings.group_size, settings.bits)


def _put(block: Block, layer: PlannedLayer, nearest: Affine, solution: Solution, rows: slice) -> None:
    """Replace a layer by the rows of a solution that are its own."""
    solved = dataclasses.replace(nearest, codes=solution.codes[rows].contiguous())
    if solution.index is not None:
        scale, zero, _ = nearest.by_columns()
        grouping = ColumnGroups(solution.index, scale.shape[1])
        solved = dataclasses.replace(solved, scale=scale.reshape(-1), zero=zero.reshape(-1), grouping=grouping)
    weight_format = layer.weight_format.for_family(solved)
    tensors, loss = weight_format.raise_(solved), float(solution.losses[rows].sum())
    block.replace(layer.name, tensors, weight_format=weight_format, loss=loss, method="gptq")
