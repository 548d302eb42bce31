"""Quantized layers in the place of float ones: put there for a checkpoint to fill, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantcore.nn.dense import DenseLinear
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.layers import QuantizedLayer, view_layer
from quantcore.nn.replace import quantized_modules, replace_module
from quantcore.nn.tied import tie_dense_heads, tied_heads

if TYPE_CHECKING:
    from quantcore.checkpoints.read import Checkpoint


def place_stored_layers(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: Mapping[str, Mapping[str, Tensor]],
    is_quantized: Callable[[DenseLinear, Mapping[str, Tensor]], bool],
    empty_layer: Callable[[str, nn.Module, DenseLinear, Mapping[str, Tensor]], QuantizedLayer],
) -> dict[str, str]:
    """Put empty quantized layers where a checkpoint stores quantized weights; the faults of those that do not fit.

    groups: its tensors, on meta, by module. is_quantized: whether those of a layer are more than a float weight.
    empty_layer: gives the layer of a name, to fill.
    """
    layers = {
        name: (module, dense)
        for name, module in model.named_modules()
        if name in groups and (dense := view_layer(module)) is not None and is_quantized(dense, groups[name])
    }
    metadata = checkpoint.read_metadata(f"{name}.{suffix}" for name in layers for suffix in groups[name])
    faults = {}
    for name, (module, dense) in layers.items():
        stored = {suffix: metadata.get(f"{name}.{suffix}", tensor) for suffix, tensor in groups[name].items()}
        try:
            layer = empty_layer(name, module, dense, stored)
        except (ValueError, LookupError) as error:
            faults[name] = _fault(name, str(error), stored)
        else:
            replace_module(model, name, layer)
    return faults


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with each quantized module replaced by a float one; marks of quantization are left on it."""
    heads = {name: head for name, head in tied_heads(model).items() if name in dict(quantized_modules(model))}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExperts):
            replace_module(model, name, module.to_dense(dtype).train(module.training))
    for name, module in list(quantized_modules(model)):
        if isinstance(module, QuantizedLayer):
            replace_module(model, name, module.to_dense(dtype).train(module.training))
    tie_dense_heads(model, heads)
    return model


def _fault(name: str, error: str, stored: Iterable[str]) -> str:
    """What does not fit a layer, with the full names of the stored tensors that it speaks of."""
    named = [f"{name}.{suffix}" for suffix in stored if f"{suffix}: " in error and f"{name}.{suffix}" not in error]
    text = error if name in error else f"{name}: {error}"
    return f"{text} (in the files: {', '.join(named)})" if named else text
