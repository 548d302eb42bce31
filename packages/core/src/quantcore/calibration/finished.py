"""Finished layers as they go into files and from process to process: their tensors, and what their formats are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.calibration.report import LayerReport
from quantcore.calibration.steps import Step
from quantcore.formats.interning import format_from_key, format_key
from quantcore.nn.dense import DenseLinear, view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.module import QuantizedModule
from quantcore.nn.replace import replace_module


@dataclass(frozen=True)
class FinishedLayer:
    """A solved layer of another process. tensors: by their full names, on the CPU."""

    line: LayerReport
    entry: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, line: LayerReport) -> FinishedLayer:
        """The layer of a model that a line of the report tells of."""
        found = model.get_submodule(line.name).state_dict()
        return cls(line, described(model, line.name), {f"{line.name}.{key}": own(t) for key, t in found.items()})

    def put(self, model: nn.Module) -> None:
        """Replace the float layer in a model by this one."""
        restore_layer(model, self.line.name, self.tensors, self.entry)


@dataclass(frozen=True)
class FinishedStep:
    """All that a solver made of a step, and what it reported. See `ResumeFolder.save`."""

    report: Sequence[LayerReport]
    layers: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, step: Step, report: Sequence[LayerReport], added: Iterable[str]) -> FinishedStep:
        tensors = {**tensors_of(model, step), **{name: model.get_parameter(name) for name in added}}
        layers = {name: described(model, name) for name in step.layers}
        return cls(list(report), layers, {name: own(tensor) for name, tensor in tensors.items()})

    def put(self, model: nn.Module, step: Step, make_room: Callable[[nn.Module, Mapping[str, Tensor]], None]) -> None:
        """Put it into a model in which the step is float; make_room: as `CalibratedQuantizer.make_room`."""
        device = device_of(model, step)
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        for name in step.layers:
            restore_layer(model, name, tensors, self.layers[name])
        restore_rest(model, step, tensors, make_room)


def own(tensor: Tensor) -> Tensor:
    """A copy on the CPU in memory of its own."""
    return tensor.detach().cpu().contiguous().clone()


def tensors_of(model: nn.Module, step: Step) -> dict[str, Tensor]:
    """What a step may have changed: all of a block; of a whole model its layers alone."""
    modules = [step.name] if step.name else list(step.layers)
    return {
        f"{module}.{suffix}": tensor
        for module in modules
        for suffix, tensor in model.get_submodule(module).state_dict().items()
    }


def described(model: nn.Module, name: str) -> dict[str, Any]:
    """Format of a quantized layer, and its tensors in their order, which the file does not keep."""
    module = model.get_submodule(name)
    assert isinstance(module, QuantizedModule)
    return {"format": format_key(module.format), "tensors": list(module.stored)}


def restore_layer(model: nn.Module, name: str, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> None:
    """Put a quantized layer in place of the float one. tensors: by full name. entry: what `described` gave."""
    module = model.get_submodule(name)
    dense = view_dense(module)
    assert dense is not None
    prefix = f"{name}."
    stored = {suffix.removeprefix(prefix): t for suffix, t in tensors.items() if suffix.startswith(prefix)}
    names = [*entry["tensors"], *(suffix for suffix in stored if suffix not in entry["tensors"])]  # then the bias
    stored = {suffix: stored[suffix].to(_home(dense)) for suffix in names}
    weight_format = format_from_key(entry["format"])
    layer = QuantizedLinear.from_stored(weight_format, stored, dense, name, dense.weight.dtype)
    replace_module(model, name, layer.train(module.training))


def restore_rest(
    model: nn.Module,
    step: Step,
    tensors: Mapping[str, Tensor],
    make_room: Callable[[nn.Module, Mapping[str, Tensor]], None],
) -> None:
    """Norms and the like, which a solver may have changed, and what it gave to other modules."""
    of_layers = tuple(f"{layer}." for layer in step.layers)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(of_layers)}
    known = tensors_of(model, step)
    make_room(model, {name: tensor for name, tensor in rest.items() if name not in known})
    current = tensors_of(model, step)
    for name, tensor in rest.items():
        if name in current:
            current[name].data.copy_(tensor)
        else:
            owner, _, suffix = name.rpartition(".")
            model.get_submodule(owner).register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))


def device_of(model: nn.Module, step: Step) -> torch.device:
    """Where the first layer of a step is, and with it what stands beside the layers."""
    dense = view_dense(model.get_submodule(step.layers[0]))
    assert dense is not None
    return _home(dense)


def _home(dense: DenseLinear) -> torch.device:
    """The device of a layer; one whose weight is not there is solved on the CPU."""
    return torch.device("cpu") if dense.weight.is_meta else dense.weight.device
