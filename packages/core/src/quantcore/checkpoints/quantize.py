"""From a float checkpoint folder to a quantized one, a tensor at a time: the model is never in memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.devices import usable_device
from quantcore.checkpoints.files import copy_companions, with_quantization, write_json
from quantcore.checkpoints.model import build_skeleton
from quantcore.checkpoints.names import fit_names, name_in_checkpoint
from quantcore.checkpoints.read import Checkpoint, quantization_dict, read_config
from quantcore.checkpoints.shards import ShardWriter
from quantcore.checkpoints.stream import fill_empty
from quantcore.checkpoints.write import atomic_directory, parse_size
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.kinds import quantize_layer
from quantcore.nn.stack import QuantizedStack, stacked_name
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.plan import PlannedLayer
from quantcore.quantizers.weight import WeightQuantizer, WeightsOf


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: Any,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Quantize a float checkpoint folder into another, with the same result as quantizing the loaded model.

    config: a config, a dict as found in config.json, or a method's name, of a method that needs no calibration. model:
    as for `load`; only its shapes are used. device: where weights are quantized. dtype: of the float weights; None
    keeps the file's. Peak memory is one weight and its quantized form.
    Raises ValueError for a source that is quantized already, and naming the tensor for one that holds NaN or inf;
    nothing is written then. Raises for target what `save` raises.
    """
    place = usable_device(device)
    checkpoint = Checkpoint(source)
    config_json = read_config(checkpoint.directory)
    check_float(checkpoint.directory, config_json)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize one")
    if getattr(quantizer, "needs_data", False):
        raise ValueError(
            f"{quantizer._method()} quantizes with calibration data, which takes the whole model; load it and use "
            "quantcore.quantize with calibration="
        )
    wanted = quantizer.update_dtype(as_dtype(dtype, "dtype"))
    skeleton = build_skeleton(checkpoint.directory, model)
    checkpoint = fit_names(skeleton, checkpoint)
    fill_empty(skeleton, checkpoint, wanted)
    layers = {_float_name(layer): layer for layer in quantizer.plan(skeleton).layers}
    quantizer.take_apart(skeleton, [layer.name for layer in layers.values()])
    layers = _settled(quantizer, layers, lambda names: _weights_of(names, checkpoint, skeleton, layers, wanted))
    rename = name_in_checkpoint(skeleton)
    with atomic_directory(target, overwrite) as directory:
        shards = ShardWriter(directory, parse_size(max_shard_size), map(rename, _names(checkpoint, skeleton, layers)))
        for name, tensor in _quantized(checkpoint, skeleton, layers, place, wanted):
            shards.add(rename(name), tensor)
        shards.finish()
        content = with_quantization(config_json, quantizer.quantization_config.to_dict(), wanted)
        write_json(content, directory / "config.json")
        copy_companions(checkpoint.directory, directory)


def check_float(directory: Path, config_json: Mapping[str, Any]) -> None:
    """Raise ValueError when a folder cannot be quantized: no config.json, or quantized already."""
    if not config_json:
        raise ValueError(f"{directory} has no config.json, which names the architecture; put the model's own there")
    found = quantization_dict(config_json)
    if found is not None:
        raise ValueError(
            f"{directory} is quantized already, with {found.get('quant_method') or 'an unnamed method'}; "
            "give the float model that it was made from"
        )


def _settled(
    quantizer: WeightQuantizer, layers: Mapping[str, PlannedLayer], weights: WeightsOf
) -> dict[str, PlannedLayer]:
    """The planned layers with the formats that depend on several weights."""
    formats = quantizer.settle(list(layers.values()), weights)
    changed = {key: layer for key, layer in layers.items() if layer.name in formats}
    return {
        **layers,
        **{key: dataclasses.replace(layer, weight_format=formats[layer.name]) for key, layer in changed.items()},
    }


def _weights_of(
    names: Collection[str],
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    layers: Mapping[str, PlannedLayer],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of planned layers; of a checkpoint's tensors those are read that can hold them."""
    tensors = {key for key, layer in layers.items() if layer.name in names}
    fused = tuple({f"{key.rsplit('.', 3)[0]}." for key in tensors - set(checkpoint.headers)})  # of expert 3's up_proj
    read = [name for name in checkpoint.headers if name in tensors or name.startswith(fused)]
    for name, tensor in _taken_apart(checkpoint.stream(read), skeleton, layers):
        if name in tensors:
            yield layers[name].name, tensor if dtype is None else tensor.to(dtype)


def _quantized(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    layers: Mapping[str, PlannedLayer],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _taken_apart(checkpoint.stream(), skeleton, layers):
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if name not in layers:
            yield name, tensor
            continue
        layer = layers[name]
        if _is_stack(layer):
            stack = QuantizedStack.from_weight(tensor.to(device), layer.weight_format, name=name)
            plugins().hook.quantcore_weight_quantized(name=name, before=tensor, after=stack.quantized_weight)
            yield from ((stacked_name(name, suffix), part) for suffix, part in stack.stored.items())
            continue
        module = skeleton.get_submodule(layer.name)
        module.weight = nn.Parameter(tensor.to(device), requires_grad=False)
        quantized = quantize_layer(module, layer.weight_format, layer.name)
        after = quantized.quantized_weight
        plugins().hook.quantcore_weight_quantized(name=layer.name, before=tensor, after=after)
        del tensor, after
        module.weight = nn.Parameter(layer.dense.weight.detach().to("meta"), requires_grad=False)
        yield from ((f"{layer.name}.{suffix}", part) for suffix, part in quantized.stored.items())


def _names(checkpoint: Checkpoint, skeleton: nn.Module, layers: Mapping[str, PlannedLayer]) -> Iterator[str]:
    headers = checkpoint.headers.items()
    empty = ((name, torch.empty(header.shape, dtype=header.dtype, device="meta")) for name, header in headers)
    for name, _ in _taken_apart(empty, skeleton, layers):
        if name in layers:
            layer = layers[name]
            specs = layer.weight_format.tensor_specs(layer.dense.shape)
            full_name = stacked_name if _is_stack(layer) else "{}.{}".format
            yield from (full_name(layer.name, spec.name) for spec in specs)
        else:
            yield name


def _is_stack(layer: PlannedLayer) -> bool:
    """Whether a planned weight is one of experts that is stored whole."""
    return layer.dense.weight.ndim > 2


def _float_name(layer: PlannedLayer) -> str:
    return layer.name if _is_stack(layer) else f"{layer.name}.weight"


def _taken_apart(
    tensors: Iterable[tuple[str, Tensor]], skeleton: nn.Module, layers: Mapping[str, PlannedLayer]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, and for a fused weight of experts that is not stored whole, the weight of each layer."""
    fused = {
        f"{name}.{weight.name}": (name, weight)
        for name, module in skeleton.named_modules()
        if isinstance(module, QuantizedExperts)
        for weight in module.fused
        if f"{name}.{weight.name}" not in layers
    }
    for name, tensor in tensors:
        if name not in fused:
            yield name, tensor
            continue
        module, weight = fused[name]
        yield from ((f"{module}.{layer}.weight", matrix) for layer, matrix in weight.matrices(tensor))
