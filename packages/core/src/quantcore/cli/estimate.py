"""Sizes of a model before and after quantizing: foreseen from config and headers alone, or measured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantcore.checkpoints.model import build_skeleton
from quantcore.checkpoints.names import fit_names
from quantcore.checkpoints.quantize import check_float
from quantcore.checkpoints.read import Checkpoint, read_config
from quantcore.checkpoints.stream import fill_empty, slots
from quantcore.formats.base import WeightFormat
from quantcore.nn.replace import quantized_modules
from quantcore.quantization_config import QuantizationConfigMixin, as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.plan import Plan
from quantcore.quantizers.weight import WeightQuantizer


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


def estimate(directory: Path, config: QuantizationConfigMixin, dtype: str | None = None) -> Sizes:
    """What quantizing a float checkpoint folder will give. Reads config and headers, and no weight.

    dtype: of the float weights; None keeps the file's.
    Raises what `float_skeleton` and `foresee` raise.
    """
    return foresee(float_skeleton(directory, dtype)[0], config)[0]


def float_skeleton(directory: Path, dtype: str | None = None) -> tuple[nn.Module, Checkpoint]:
    """The float model of a checkpoint folder on the meta device, and its tensors under the names of the model.

    Raises ValueError for a folder that is quantized already or has no config.json, CheckpointError for tensors that do
    not fit the architecture.
    """
    check_float(directory, read_config(directory))
    model = build_skeleton(directory)
    checkpoint = fit_names(model, Checkpoint(directory))
    fill_empty(model, checkpoint, as_dtype(dtype, "dtype"))
    return model, checkpoint


def foresee(model: nn.Module, config: QuantizationConfigMixin) -> tuple[Sizes, Plan]:
    """The sizes of a float model before and after, and the plan; raises what `WeightQuantizer.plan` raises."""
    quantizer = _quantizer(config)
    plan = quantizer.plan(model)
    tensors = {id(slot.tensor): slot.tensor for slot in slots(model).values()}.values()
    before = sum(tensor.nbytes for tensor in tensors)
    dense = sum(layer.dense.weight.nbytes for layer in plan.layers)
    quantized = plan.quantized_bytes
    sizes = Sizes(
        config=quantizer.quantization_config.to_dict(),
        layers=len(plan.layers),
        weights=plan.quantized_weights,
        quantized_bytes=quantized,
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=before - dense + quantized,
        bytes_before=before,
        left=plan.left,
        formats=_count(layer.weight_format for layer in plan.layers),
    )
    return sizes, plan


def measure(directory: Path, expected: Sizes, model: nn.Module | None = None) -> Sizes:
    """The sizes of a folder that was made as foreseen; model: what was saved there, where it is at hand."""
    size = sum(header.nbytes for header in Checkpoint(directory).headers.values())
    formats = expected.formats
    if model is not None:
        formats = _count(module.format for _, module in quantized_modules(model))
    quantized = expected.quantized_bytes + size - expected.bytes
    return dataclasses.replace(expected, bytes=size, quantized_bytes=quantized, formats=formats)


def _quantizer(config: QuantizationConfigMixin) -> WeightQuantizer:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize a model")
    return quantizer


def _count(formats: Iterable[WeightFormat]) -> dict[str, int]:
    return dict(Counter(map(repr, formats)))
