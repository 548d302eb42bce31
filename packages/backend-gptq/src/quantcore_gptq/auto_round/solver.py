"""SignRound on one block: all its layers are tuned together, so that the block gives what the float block gave.

Source: Cheng et al. 2023, SignRound (arXiv:2309.05516), section 3.2, with the schedule of auto-round 0.16.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantcore.sdk import join_samples, view_dense
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq
from quantcore_gptq.auto_round.grid import Groups
from quantcore_gptq.auto_round.tuning import TunedWeight

if TYPE_CHECKING:
    from quantcore.sdk import Block, PlannedLayer, Sample

SEED = 42
_LOSS_SCALE = 1000.0  # keeps gradients of half precision above zero; their signs are all that counts


@dataclass(frozen=True)
class Schedule:
    """How a block is tuned. rate, range_rate: first steps of offsets and factors, which fall to 0 in a line."""

    iters: int
    batch_size: int
    rate: float
    range_rate: float
    tunes_range: bool = True


def tune_block(block: Block, schedule: Schedule) -> None:
    """Replace every layer of a block by its tuned form; layers that no token reaches are rounded to nearest.

    Raises ValueError naming the block when the loss is NaN or inf.
    """
    weights = {name: _tuned(layer, schedule) for name, layer in block.layers.items()}
    with _leaves(block) as leaves:
        best, reached = _tune(block, weights, leaves, schedule)
    for name, weight in weights.items():
        if name in reached:
            codes, scales = weight.result()
            block.replace(name, _format(block.layers[name]).store_rounded(codes, scales), loss=best)
        else:
            block.round_to_nearest(name, "no token of the calibration data reached it")


def _tune(
    block: Block, weights: Mapping[str, TunedWeight], leaves: Mapping[str, Leaf], schedule: Schedule
) -> tuple[float, set[str]]:
    """The least loss, whose parameters the weights keep, and the names of the layers that had a part in it."""
    best, reached = math.inf, set()
    for number, batch in enumerate(_batches(block.samples, schedule)):
        for name, weight in weights.items():
            weight.write(leaves[name].weight)
        loss = _backward(block, batch)
        if loss < best:
            best = loss
            for weight in weights.values():
                weight.keep()
        left = 1 - number / schedule.iters
        for name, leaf in leaves.items():
            grad = leaf.take_grad()
            if grad is not None:
                reached.add(name)
                weights[name].step(grad, schedule.rate * left, schedule.range_rate * left)
    return best, reached


def _tuned(layer: PlannedLayer, schedule: Schedule) -> TunedWeight:
    weight, weight_format = layer.dense.weight, _format(layer)
    groups = Groups.of(weight, weight_format.run(weight.shape[1]))
    return TunedWeight(groups, weight_format.bits, weight_format.is_symmetric, schedule.tunes_range)


def _format(layer: PlannedLayer) -> AutoRoundGptq | AutoRoundAwq:
    assert isinstance(layer.weight_format, AutoRoundGptq | AutoRoundAwq)
    return layer.weight_format


def _backward(block: Block, batch: Sample) -> float:
    """The loss on a batch; gradients are added to the leaves."""
    with torch.enable_grad():
        found = block.output(batch)
        target = batch.target if batch.target is not None else found.detach()
        error = (found.float() - target.float()).square()
        loss = (error if batch.mask is None else error[batch.mask]).mean()
        (loss * _LOSS_SCALE).backward()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"{block.name}: the output of this block holds NaN or inf; calibrate in bfloat16 or float32")
    return value


def _batches(samples: Sequence[Sample], schedule: Schedule) -> Iterator[Sample]:
    """A random batch for each step, the same in every run."""
    draw = random.Random(SEED)
    for _ in range(schedule.iters):
        chosen = sorted(draw.sample(range(len(samples)), min(schedule.batch_size, len(samples))))
        yield join_samples([samples[number] for number in chosen])


@dataclass(frozen=True)
class Leaf:
    """The parameter that stands for a layer's weight while it is tuned. weight: a view of it as [N, K]."""

    parameter: nn.Parameter
    weight: Tensor
    is_transposed: bool

    def take_grad(self) -> Tensor | None:
        """The gradient [N, K], which is then forgotten; None where no output depends on the weight."""
        grad, self.parameter.grad = self.parameter.grad, None
        return grad.t() if grad is not None and self.is_transposed else grad


@contextlib.contextmanager
def _leaves(block: Block) -> Iterator[dict[str, Leaf]]:
    """A weight of its own for each layer of the block; gradients are computed for these alone."""
    modules = {name: block.model.get_submodule(name) for name in block.layers}
    before: dict[str, nn.Parameter] = {name: module.get_parameter("weight") for name, module in modules.items()}
    trained = [parameter for parameter in block.module.parameters() if parameter.requires_grad]
    leaves = {}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for name, module in modules.items():
            module.weight = nn.Parameter(torch.empty_like(before[name]))
            dense = view_dense(module)
            assert dense is not None
            leaves[name] = Leaf(module.weight, dense.weight, not issubclass(dense.kind, nn.Linear))
        yield leaves
    finally:
        for name, module in modules.items():
            module.weight = before[name]
        for parameter in trained:
            parameter.requires_grad_(True)
