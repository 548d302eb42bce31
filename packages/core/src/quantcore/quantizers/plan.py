"""What quantizing a model will do: the layers that it takes, those that it leaves, and the log of both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from quantcore.nn.planned import PlannedLayer as PlannedLayer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What quantizing a model will do: the layers it takes, and the linear layers it leaves, each with the reason.

    misfits: names of those among left whose shape their format cannot store.
    """

    layers: tuple[PlannedLayer, ...]
    left: Mapping[str, str]
    misfits: tuple[str, ...] = ()

    @property
    def quantized_weights(self) -> int:
        """Number of weights that will be quantized."""
        return sum(layer.dense.weight.numel() for layer in self.layers)

    @property
    def quantized_bytes(self) -> int:
        """Number of bytes in which they will be stored."""
        specs = (layer.weight_format.tensor_specs(layer.dense.shape) for layer in self.layers)
        return sum(spec.nbytes for each in specs for spec in each)

    def reasons(self, names: Iterable[str]) -> list[str]:
        """A line for each reason for which layers of these names are left float, with the first few of them."""
        return by_reason({name: self.left[name] for name in names})


def by_reason(reasons: Mapping[str, str], shown: int = 4) -> list[str]:
    """A line for each reason, with how many layers it holds for and the first few names."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{', '.join(of[:shown])}{f' and {len(of) - shown} more' if len(of) > shown else ''}: {reason}"
        for reason, of in names.items()
    ]


def nothing_to_do(model: nn.Module, left: Mapping[str, str]) -> str:
    """The error for a model of which no layer is taken."""
    if not left:
        return f"{type(model).__name__} has no Linear layers to quantize"
    reasons = "; ".join(by_reason(left)[:5])
    return (
        f"every Linear layer of {type(model).__name__} is left float ({reasons}); change the config, or its skip list"
    )


def report_plan(plan: Plan, model: nn.Module) -> None:
    """Log how much of a model will be quantized, in how many bytes, and what stays float with the reason."""
    count, total = plan.quantized_weights, sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "quantizing %d layers: %d of %d weights (%.1f %%), stored in %d bytes",
        *(len(plan.layers), count, total, 100 * count / total, plan.quantized_bytes),
    )
    for name, reason in plan.left.items():
        logger.info("%s stays float: %s", name, reason)
    if 2 * count < total:
        largest = sorted(_float_weights(plan, model), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{name} ({100 * size / total:.0f} %)" for name, size in largest)
        logger.warning("only %.0f %% of the weights are quantized; most of the others: %s", 100 * count / total, named)


def _float_weights(plan: Plan, model: nn.Module) -> list[tuple[str, int]]:
    """Name and size of every parameter of which the plan quantizes nothing."""
    taken = {layer.dense.weight.untyped_storage()._cdata for layer in plan.layers}
    parameters = model.named_parameters()
    return [(name, each.numel()) for name, each in parameters if each.untyped_storage()._cdata not in taken]
