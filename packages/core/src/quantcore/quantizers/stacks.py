"""Experts whose 3-D weights are stored whole: quantizing them, and putting those of a checkpoint in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from quantcore.checkpoints.names import part_names
from quantcore.checkpoints.read import Checkpoint
from quantcore.formats.base import WeightFormat
from quantcore.nn.experts import FusedWeight, QuantizedExperts, fused_experts, fused_weights
from quantcore.nn.replace import replace_module
from quantcore.nn.stack import QuantizedStack, stored_whole
from quantcore.plugins.manager import plugins


def place_stored_stacks(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: Mapping[str, Mapping[str, Tensor]],
    format_for: Callable[[str, nn.Module], WeightFormat],
) -> dict[str, str]:
    """Put empty stacks where the checkpoint stores 3-D weights so; the faults of those that do not fit, by name.

    groups: its tensors, on meta, by module. format_for: the format of a linear layer by name, to read a stack with.
    """
    names, faults = part_names(model), {}
    for name, module in list(fused_experts(model)):
        stacks = {}
        for weight in fused_weights(module):
            label = f"{name}.{weight.name}" if name else weight.name
            stored = _stored(weight, module, groups.get(name, {}))
            if not stored:
                continue
            metadata = checkpoint.read_metadata(f"{label}{suffix.removeprefix('weight')}" for suffix in stored)
            own = {f"weight{key[len(label) :]}": tensor for key, tensor in metadata.items()}
            rows, columns = weight.shape[1:]
            linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=module.get_parameter(weight.name).dtype)
            try:
                stacks[weight.name] = QuantizedStack(format_for(label, linear), {**stored, **own}, weight.shape, label)
            except (ValueError, LookupError) as error:
                faults[name] = str(error)
        if stacks:
            replace_module(model, name, QuantizedExperts(module, names.get(name), stacks))
    return faults


def quantize_stacks(model: nn.Module, formats: Mapping[str, WeightFormat]) -> set[str]:
    """Quantize the 3-D weights of experts that the formats name, in place, and return their names."""
    names, done = part_names(model), set()
    for name, module in list(fused_experts(model)):
        stacks = {}
        for weight in fused_weights(module):
            label = f"{name}.{weight.name}" if name else weight.name
            if label in formats:
                parameter = module.get_parameter(weight.name)
                stacks[weight.name] = QuantizedStack.from_weight(parameter, formats[label], name=label)
                after = stacks[weight.name].quantized_weight
                plugins().notify("quantcore_weight_quantized", name=label, before=parameter.detach(), after=after)
                done.add(label)
        if stacks:
            split = QuantizedExperts(module, names.get(name), stacks).train(module.training)
            replace_module(model, name, split)
    return done


def _stored(weight: FusedWeight, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that store a 3-D weight whole, by suffix; none where they are the float weight itself."""
    others = set(module._parameters) - {weight.name}
    stored = stored_whole(tensors, weight.name, others)
    plain = stored.get("weight")
    is_float = plain is not None and plain.is_floating_point() and tuple(plain.shape) == weight.shape
    return {} if is_float and len(stored) == 1 else stored
