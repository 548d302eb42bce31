"""The layers of a block that see the same inputs, solved as one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore_gptq.gptq.config import LayerSettings
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.gptq.pieces import solve_pieces
from quantcore_gptq.gptq.settings import Settings
from quantcore_gptq.gptq.solver import HessianError, Solution, curvature

if TYPE_CHECKING:
    from quantcore.sdk import Block, PlannedLayer


def solve_together(
    block: Block,
    names: Sequence[str],
    hessian: Tensor,
    layer_settings: LayerSettings,
    damp_step: float,
    *,
    is_shared: bool,
) -> None:
    """Put the solution of each named layer in place; hessian [K, K] of their common inputs is overwritten.

    is_shared: whether each process solves some of the rows. Where it has no inverse, the layers are rounded to nearest.
    """
    layers = [block.layers[name] for name in names]
    settings = _solver_settings(layers[0], layer_settings, damp_step)
    try:
        shared = curvature(hessian, settings)
    except HessianError as error:
        for name in names:
            block.round_to_nearest(name, str(error))
        return
    weight = torch.cat([layer.dense.weight for layer in layers])
    solution = solve_pieces(block, weight, shared, settings, None, is_shared=is_shared)
    first = 0
    for layer in layers:
        last = first + layer.dense.shape[0]
        block.replace(layer.name, _stored(layer, solution, first, last), loss=float(solution.losses[first:last].sum()))
        first = last


def _solver_settings(layer: PlannedLayer, settings: LayerSettings, damp_step: float) -> Settings:
    weight_format = _format_of(layer)
    return Settings(
        bits=settings.bits,
        group_size=weight_format.run(layer.dense.shape[1]),
        sym=settings.sym,
        desc_act=settings.desc_act,
        group_aware=settings.act_group_aware,
        static_groups=settings.static_groups,
        mse=settings.mse or (2.0 if settings.weighted_mse else 0.0),
        weighted=settings.weighted_mse,
        damp=settings.damp_percent,
        damp_step=damp_step,
        zero_range=weight_format.zero_range,
    )


def _stored(layer: PlannedLayer, solution: Solution, first: int, last: int) -> dict[str, Tensor]:
    """What is stored of rows first to last of a solution."""
    grid = solution.grid
    rows = dataclasses.replace(grid, scale=grid.scale[first:last], zero=grid.zero[first:last])
    weight_format = _format_of(layer) if solution.index is None else _format_of(layer).replace(g_idx="any")
    assert isinstance(weight_format, Gptq)
    return weight_format.store(solution.codes[first:last], rows, solution.index)


def _format_of(layer: PlannedLayer) -> Gptq:
    assert isinstance(layer.weight_format, Gptq)
    return layer.weight_format
