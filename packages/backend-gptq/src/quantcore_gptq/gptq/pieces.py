"""A weight solved in pieces of its rows, which several processes share out.

The pieces are the same however many processes there are, so that the last bit of every sum is too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from quantcore_gptq.gptq.solver import Curvature, Solution, join, solve

if TYPE_CHECKING:
    from quantcore.sdk import Block
    from quantcore_gptq.gptq.settings import Settings
    from quantcore_gptq.rounding import Grid

D = TypeVar("D", bound=Any)  # a dataclass

_ROWS = 2048  # of a piece: enough that the steps of one column take longer than starting them


def share(block: Block, units: Sequence[Sequence[str]], solve: Callable[[Sequence[str], bool], None]) -> None:
    """Solve units of layers with the same inputs: each in one process, or by rows where there are fewer than processes.

    solve: gets the names of a unit, and whether processes share out its rows.
    """
    if len(units) >= block.processes:
        block.share(units, lambda names: solve(names, False))
        return
    for names in units:
        solve(names, True)


def solve_pieces(
    block: Block, weight: Tensor, curvature: Curvature, settings: Settings, grid: Grid | None, *, is_shared: bool
) -> Solution:
    """As `solve`. is_shared: whether each process solves some pieces; all of them must call this then."""
    count = max(1, round(len(weight) / _ROWS))
    if count == 1:
        return solve(weight, curvature, settings, grid)
    ends = [len(weight) * number // count for number in range(count + 1)]
    rows = [slice(start, end) for start, end in itertools.pairwise(ends)]

    def solved(number: int) -> Solution:
        own = rows[number]
        part = None if grid is None else dataclasses.replace(grid, scale=grid.scale[own], zero=grid.zero[own])
        return solve(weight[own], curvature, settings, part)

    if not is_shared or block.processes == 1:
        return join([solved(number) for number in range(count)])
    costs = [float(own.stop - own.start) for own in rows]
    found = block.spread(costs, lambda number: _moved(solved(number), torch.device("cpu")))
    return _moved(join(found), weight.device)


def _moved(value: D, device: torch.device) -> D:
    """A dataclass with its tensors, and those of dataclasses in it, on a device, in memory of their own."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    tensors = {name: found.to(device).contiguous() for name, found in fields.items() if isinstance(found, Tensor)}
    parts = {name: _moved(found, device) for name, found in fields.items() if dataclasses.is_dataclass(found)}
    return dataclasses.replace(value, **tensors, **parts)
