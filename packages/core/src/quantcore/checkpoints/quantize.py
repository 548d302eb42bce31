"""From a float checkpoint folder to a quantized one, a tensor at a time: the model is never in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.checkpoints.files import copy_companions, with_quantization, write_json
from quantcore.checkpoints.model import build_skeleton
from quantcore.checkpoints.read import Checkpoint, quantization_dict, read_config
from quantcore.checkpoints.shards import ShardWriter
from quantcore.checkpoints.stream import fill_empty
from quantcore.checkpoints.write import atomic_directory, parse_size
from quantcore.nn.linear import QuantizedLinear
from quantcore.quantization_config import as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.weight import PlannedLayer, WeightQuantizer


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
    fill_empty(skeleton, checkpoint, wanted)
    layers = {f"{layer.name}.weight": layer for layer in quantizer.plan(skeleton).layers}
    with atomic_directory(target, overwrite) as directory:
        shards = ShardWriter(directory, parse_size(max_shard_size), _names(checkpoint, layers))
        for name, tensor in _quantized(checkpoint, skeleton, layers, torch.device(device), wanted):
            shards.add(name, tensor)
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


def _quantized(
    checkpoint: Checkpoint,
    skeleton: nn.Module,
    layers: Mapping[str, PlannedLayer],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    for name, stored in checkpoint.stream():
        tensor = stored.to(dtype) if dtype is not None and stored.is_floating_point() else stored
        del stored
        if name not in layers:
            yield name, tensor
            continue
        layer = layers[name]
        module = skeleton.get_submodule(layer.name)
        module.weight = nn.Parameter(tensor.to(device), requires_grad=False)
        del tensor
        quantized = QuantizedLinear.from_linear(module, layer.weight_format, name=layer.name)
        module.weight = nn.Parameter(layer.dense.weight, requires_grad=False)  # on the meta device
        yield from ((f"{layer.name}.{suffix}", part) for suffix, part in quantized.stored.items())


def _names(checkpoint: Checkpoint, layers: Mapping[str, PlannedLayer]) -> Iterator[str]:
    for name in checkpoint.headers:
        if name in layers:
            layer = layers[name]
            specs = layer.weight_format.tensor_specs(layer.dense.shape)
            yield from (f"{layer.name}.{spec.name}" for spec in specs)
        else:
            yield name
