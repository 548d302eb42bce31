"""Matrices that a module multiplies itself, where a checkpoint stores them quantized: routers of old checkpoints.

What chose experts was a linear layer once, and tools quantized it with the others. The modules that have taken its
place hold a plain parameter, which stays float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantcore.checkpoints.read import Checkpoint, Derived
from quantcore.checkpoints.source import Header
from quantcore.checkpoints.values import refuse, value_faults
from quantcore.errors import CheckpointError
from quantcore.nn.dense import DenseLinear
from quantcore.nn.layers import QuantizedLayer, view_layer
from quantcore.nn.module import QuantizedModule

IsQuantized = Callable[[DenseLinear, Mapping[str, Tensor]], bool]
EmptyLayer = Callable[[str, nn.Module, DenseLinear, Mapping[str, Tensor]], QuantizedLayer]


def stored_matrices(
    model: nn.Module, checkpoint: Checkpoint, is_quantized: IsQuantized
) -> dict[str, dict[str, Tensor]]:
    """The tensors, on meta, of modules whose own matrix "weight" is stored quantized: {module: {suffix: tensor}}."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name, module in model.named_modules() if _multiplies(module)}
    for name, header in checkpoint.headers.items() if found else ():
        parts = name.split(".")
        for cut in range(1, len(parts)):
            owner, suffix = ".".join(parts[:cut]), ".".join(parts[cut:])
            if owner in found and _is_of_weight(model.get_submodule(owner), suffix):
                found[owner][suffix] = header.empty()
    return {name: stored for name, stored in found.items() if is_quantized(_dense(model.get_submodule(name)), stored)}


def float_matrices(
    model: nn.Module, checkpoint: Checkpoint, groups: Mapping[str, Mapping[str, Tensor]], empty_layer: EmptyLayer
) -> list[Derived]:
    """The float weights of modules that `stored_matrices` found, each made of what stores it.

    Raises CheckpointError listing the modules whose tensors do not fit.
    """
    metadata = checkpoint.read_metadata(f"{name}.{suffix}" for name, stored in groups.items() for suffix in stored)
    derived, faults = [], []
    for name, stored in groups.items():
        described = {suffix: metadata.get(f"{name}.{suffix}", tensor) for suffix, tensor in stored.items()}
        dense = _dense(model.get_submodule(name))
        rows, columns = dense.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=dense.weight.dtype)
        try:
            layer = empty_layer(name, linear, dense, described)
        except (ValueError, LookupError) as error:
            faults.append(f"{name}: {error}")
            continue
        made = Header("", dense.weight.dtype, (rows, columns), 0)
        make = partial(_dequantized, checkpoint.directory, name, layer, dense.weight.dtype)
        derived.append(Derived(tuple(f"{name}.{suffix}" for suffix in stored), {f"{name}.weight": made}, make))
    if faults:
        raise CheckpointError(f"{checkpoint.directory}: {len(faults)} layers do not fit\n" + "\n".join(faults))
    return derived


def _dequantized(
    directory: Path, name: str, layer: QuantizedLayer, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The float weight of stored tensors by their full names."""
    stored = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
    bias = stored.pop("bias", None)
    if bias is not None and bool(bias.any()):
        raise CheckpointError(f"{directory}: {name}.bias is not zero, and the model has no bias there")
    layer.store(stored)
    refuse(directory, value_faults(f"{name}.", layer.quantized_weight))
    return {f"{name}.weight": layer.dequantize(dtype)}


def _multiplies(module: nn.Module) -> bool:
    """Whether a module has a matrix of its own, and is neither a linear layer nor an embedding."""
    weight = module._parameters.get("weight")
    return (
        weight is not None and weight.ndim == 2 and not isinstance(module, QuantizedModule) and not view_layer(module)
    )


def _is_of_weight(module: nn.Module, suffix: str) -> bool:
    """Whether a tensor of a module is none of its other parameters and buffers, and not of a child."""
    own = {*module._parameters, *module._buffers} - {"weight"}
    return suffix not in own and suffix.partition(".")[0] not in module._modules


def _dense(module: nn.Module) -> DenseLinear:
    return DenseLinear(module.get_parameter("weight").detach(), None, nn.Linear)
