"""Sizes of a model before and after quantizing: foreseen from config and headers alone, or measured."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantcore.checkpoints.names import name_in_checkpoint
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.shards import entry_room
from quantcore.checkpoints.stream import slots
from quantcore.formats.base import WeightFormat
from quantcore.nn.replace import quantized_modules
from quantcore.workflows.quantize import PlannedQuantization


@dataclass(frozen=True)
class Sizes:
    """A model before and after. Bytes are those of tensors; files hold their headers besides.

    left: linear layers that stay float, with the reason. formats: repr of each format, with its number of layers.
    config: what stands in config.json.
    """

    config: Mapping[str, Any]
    layers: int
    weights: int  # in those layers
    quantized_bytes: int  # of those weights
    parameters: int  # of the whole float model
    bytes: int
    bytes_before: int
    left: Mapping[str, str]
    formats: Mapping[str, int]

    @property
    def bits_per_quantized_weight(self) -> float:
        return 8 * self.quantized_bytes / self.weights

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Every field and both ratios."""
        ratios = {name: getattr(self, name) for name in ("bits_per_quantized_weight", "bits_per_parameter")}
        return {**dataclasses.asdict(self), **ratios}


def sizes_of(planned: PlannedQuantization) -> Sizes:
    """The sizes of a float model before and after what is planned; nothing is read for it."""
    plan = planned.plan
    tensors = {id(slot.tensor): slot.tensor for slot in slots(planned.skeleton).values()}.values()
    before = sum(tensor.nbytes for tensor in tensors)
    dense = sum(layer.dense.weight.nbytes for layer in plan.layers)
    quantized = plan.quantized_bytes
    return Sizes(
        config=planned.quantizer.quantization_config.to_dict(),
        layers=len(plan.layers),
        weights=plan.quantized_weights,
        quantized_bytes=quantized,
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=before - dense + quantized,
        bytes_before=before,
        left=plan.left,
        formats=_count(layer.weight_format for layer in plan.layers),
    )


def file_bytes_of(planned: PlannedQuantization, sizes: Sizes, calibrates: bool) -> int:
    """What the one file of a planned checkpoint takes: its tensors, and a header without metadata.

    calibrates: whether every tensor is known before the first is written; the header then takes no more than it must,
    else there is room for the longest entries.
    """
    names = _names(planned)
    if not calibrates:
        return 8 + sum(map(entry_room, names)) + sizes.bytes
    entries = {name: {"dtype": "BF16", "shape": [0, 0], "data_offsets": [sizes.bytes, sizes.bytes]} for name in names}
    return 8 + len(json.dumps(entries, separators=(",", ":"))) + sizes.bytes


def _names(planned: PlannedQuantization) -> list[str]:
    """The tensors of a planned checkpoint by name; tied ones once."""
    plan, rename = planned.plan, name_in_checkpoint(planned.skeleton)
    taken = {f"{layer.name}.weight" for layer in plan.layers} | {layer.name for layer in plan.layers}
    names = [
        f"{rename(layer.name)}.{spec.name}"
        for layer in plan.layers
        for spec in layer.weight_format.tensor_specs(layer.dense.shape)
    ]
    first = {id(slot.tensor): name for name, slot in reversed(slots(planned.skeleton).items())}
    return names + [rename(name) for name in first.values() if name not in taken]


def measure(directory: Path, expected: Sizes, model: nn.Module | None = None) -> Sizes:
    """The sizes of a folder that was made as foreseen; model: what was saved there, where it is at hand."""
    size = sum(header.nbytes for header in Checkpoint(directory).headers.values())
    formats = expected.formats
    if model is not None:
        formats = _count(module.format for _, module in quantized_modules(model))
    quantized = expected.quantized_bytes + size - expected.bytes
    return dataclasses.replace(expected, bytes=size, quantized_bytes=quantized, formats=formats)


def _count(formats: Iterable[WeightFormat]) -> dict[str, int]:
    return dict(Counter(map(repr, formats)))
