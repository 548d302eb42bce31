"""Quantizing a float checkpoint while it loads, inside transformers' loader."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.integrations.accelerate import get_device

from quantcore.checkpoints.devices import is_on_disk
from quantcore.checkpoints.read import Checkpoint
from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat
from quantcore.integrations.transformers.conversion import (
    LayerConverter,
    LayerOperation,
    modules_after_renaming,
    name_with_prefix,
)
from quantcore.integrations.transformers.placing import hold_buffers, restore_operands
from quantcore.nn.experts import FusedWeight, QuantizedExperts, fused_weights
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import quantized_modules
from quantcore.nn.tied import tied_heads
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.plan import PlannedLayer, report_plan
from quantcore.quantizers.stacks import quantize_stacks
from quantcore.quantizers.weight import WeightQuantizer

logger = logging.getLogger(__name__)

_WEIGHTS = "weights of layers to quantize"
_EXPERTS = "weights of experts to quantize"


class QuantizingLoad:
    """The load of a float checkpoint, of which each planned layer is quantized as soon as its weight is there."""

    def __init__(
        self, quantizer: HfQuantizer, model: nn.Module, files: list[Path], dtype: torch.dtype | None, device_map: Any
    ) -> None:
        assert isinstance(quantizer, WeightQuantizer)
        self.quantizer = quantizer
        self.model = model
        self.device_map = device_map
        self.operation = LayerOperation(self._receive)
        self._dtype = dtype
        self._checkpoint = Checkpoint.of_files(files) if can_be_read(files) else None
        self._layers: dict[str, PlannedLayer] = {}  # by the name of the weight
        self._stacks: dict[str, PlannedLayer] = {}  # 3-D weights of experts that are stored whole, by name
        self._fused: dict[str, tuple[str, FusedWeight]] = {}  # by the name of the parameter: its module, what it holds

    def begin(self, conversions: list[Any]) -> list[Any]:
        """Plan the layers; our conversions around transformers'.

        Experts that are taken apart take their tensors before transformers would put them together. Other weights are
        taken when no conversion of transformers changes them; those that one makes come through `operation`.
        """
        if self._checkpoint is not None:
            stored = modules_after_renaming(self.model, self._checkpoint.headers, conversions)
            self.quantizer.know_names(self.model, stored)
        plan = self.quantizer.plan(self.model)
        report_plan(plan, self.model)
        for layer in plan.layers:
            if layer.dense.kind is QuantizedExperts:
                self._stacks[layer.name] = layer
            else:
                self._layers[f"{layer.name}.weight"] = layer
        self.quantizer.take_apart(self.model, [layer.name for layer in self._layers.values()])
        self.quantizer.preprocess_model(self.model, self._dtype, self.device_map)
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedExperts):
                self._fused |= {f"{name}.{weight.name}": (name, weight) for weight in module.fused}
        before = LayerConverter(_EXPERTS, self._claim_expert, self.operation, self._source)
        return [before, *conversions, LayerConverter(_WEIGHTS, self._claim, self.operation, self._source)]

    def takes(self, name: str) -> bool:
        """Whether a parameter is to be quantized."""
        return name in self._layers or name in self._stacks

    def bits_per_weight(self, name: str) -> float | None:
        """Stored bits a weight of a parameter that will be quantized, None for another."""
        layer = self._layers.get(name) or self._stacks.get(name)
        return None if layer is None else layer.weight_format.bits_per_weight(layer.dense.shape)

    def weights(self) -> tuple[dict[str, WeightFormat], list[str]]:
        """The format of each layer to quantize by name, and names of heads that share such an embedding."""
        found = {str(layer.name): layer.weight_format for layer in self._layers.values()}
        return found, [head for embedding, head in tied_heads(self.model).items() if embedding in found]

    def finish(self) -> None:
        """Called when transformers has filled the model.

        Raises CheckpointError when experts got no weights: their architecture stores them in a way that is not known.
        """
        restore_operands(self.model)
        empty = [
            layer.name
            for layer in self._layers.values()
            if not isinstance(self.model.get_submodule(layer.name), QuantizedModule)
        ]
        experts = [name for name in empty if any(name.startswith(f"{owner}.") for owner, _ in self._fused.values())]
        if experts:
            raise CheckpointError(
                f"{experts[0]} and {len(experts) - 1} more layers of experts got no weights; quantize the loaded float "
                "model with quantcore.quantize instead"
            )
        if empty:
            logger.warning("not in the checkpoint, so new and left float: %s", ", ".join(empty))

    def _source(self, target: str, name: str, given: Any) -> Any:
        """A function that reads a float weight when it is needed, in place of transformers' own.

        That maps the files, and every page it has looked at stays in memory until the whole model is loaded.
        """
        if self._checkpoint is None or not self.takes(target):
            return given
        return partial(self._read, self._checkpoint, name, get_device(self.device_map or {"": "cpu"}, target, True))

    def _read(self, checkpoint: Checkpoint, name: str, device: Any) -> Tensor:
        ((_, tensor),) = checkpoint.stream([name])
        return tensor.to(device, self._dtype)

    def _claim(self, name: str) -> str | None:
        final = name_with_prefix(name, self.model)
        return final if self.takes(final) else None

    def _claim_expert(self, name: str) -> str | None:
        final = name_with_prefix(name, self.model)
        if final in self._fused:
            module, weight = self._fused[final]
            return f"{module}.0.{weight.parts[0]}.weight"
        owner = final.rpartition(".")[0]
        inside = any(owner.startswith(f"{module}.") for module, _ in self._fused.values())
        return final if inside and final.endswith(".weight") else None

    def _receive(self, name: str, tensors: dict[str, Tensor], missing: set[str]) -> dict[str, Tensor]:
        (tensor,) = tensors.values()
        tensors.clear()
        if name in self._stacks:
            return self._quantize_stack(name, tensor, missing)
        if tensor.ndim != 3:
            return self._quantize(name, tensor, missing)
        return self._quantize_experts(name, tensor, missing)

    def _quantize_experts(self, name: str, tensor: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """As `_quantize`, for a 3-D weight; name: the first of the weights that it holds."""
        module, weight = next(
            (module, weight)
            for module, weight in self._fused.values()
            if name == f"{module}.0.{weight.parts[0]}.weight"
        )
        result: dict[str, Tensor] = {}
        for inner, matrix in weight.matrices(tensor):
            result |= self._quantize(f"{module}.{inner}.weight", matrix, missing)
        return result

    def _quantize_stack(self, name: str, tensor: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """As `_quantize`, for a 3-D weight that is stored whole: when all of its module are there, they are."""
        owner, _, parameter = name.rpartition(".")
        module = self.model.get_submodule(owner)
        module._parameters[parameter] = nn.Parameter(tensor, requires_grad=False)
        missing.discard(name)
        weights = [f"{owner}.{weight.name}" for weight in fused_weights(module)]
        if any(self.model.get_parameter(weight).is_meta for weight in weights):
            return {}  # the others come later; those that stay float come before, for a method takes all or none
        formats = {weight: self._stacks[weight].weight_format for weight in weights if weight in self._stacks}
        quantize_stacks(self.model, formats)
        result: dict[str, Tensor] = {}
        for stack_name, stack in quantized_modules(self.model.get_submodule(owner)):
            result |= self._finish(f"{owner}.{stack_name}", stack)
        return result

    def _quantize(self, name: str, tensor: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """Put a weight into its layer and quantize that; what goes to the disk is given back instead."""
        planned = self._layers.get(name)
        if planned is None:
            return {name: tensor}
        self.model.get_submodule(planned.name).weight = nn.Parameter(tensor, requires_grad=False)
        self.quantizer._quantize_layer(self.model, planned.name, planned.weight_format)
        missing.discard(name)
        module = self.model.get_submodule(planned.name)
        assert isinstance(module, QuantizedModule)
        return self._finish(planned.name, module)

    def _finish(self, name: str, module: QuantizedModule) -> dict[str, Tensor]:
        on_disk = is_on_disk(self.device_map, name)
        stored = {module.full_name(f"{name}.", suffix): value.detach() for suffix, value in module.stored.items()}
        hold_buffers(module, on_disk)
        return stored if on_disk else {}


def can_be_read(files: list[Path]) -> bool:
    """Whether weights can be read here: whole, for this process alone, and not from a pickle."""
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    return is_alone and bool(files) and all(file.suffix == ".safetensors" for file in files)
