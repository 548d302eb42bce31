"""Scales of activations that are stored with a layer, from the range that calibration data have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.calibration.statistics import MinMax
from quantcore_misc.compressed_tensors.scaling import Scaling, nvfp4_global_scale

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.formats.activation import Activation
    from quantcore_misc.compressed_tensors.weight import CompressedWeight


def measure(block: Block) -> None:
    """Have scales stored with the layers of a block whose inputs are static, from the range of what reaches them.

    A layer that no token reaches keeps the scale 1.
    """
    formats: dict[str, CompressedWeight] = {name: layer.weight_format for name, layer in block.layers.items()}  # type: ignore[misc]
    static = [name for name, each in formats.items() if needs_range(each.input)]
    ranges = block.collect(static, lambda layer: MinMax(layer.dense.shape[1])) if static else {}
    for name, found in ranges.items():
        if not found.tokens:
            continue
        dtype, device = formats[name].torch_dtype, block.layers[name].dense.weight.device
        tensors = range_tensors(formats[name].input, found.low.amin().to(dtype), found.high.amax().to(dtype), "input")
        block.store_besides(name, {suffix: tensor.to(device) for suffix, tensor in tensors.items()})


def round_block(block: Block) -> None:
    """Round every layer of a block by its format."""
    for name, layer in block.layers.items():
        block.replace(name, layer.weight_format.quantize(layer.dense.weight))


def needs_range(activation: Activation | None) -> bool:
    """Whether a layer stores something of the range of its activations."""
    return activation is not None and (activation.is_static or activation.outer is not None)


def range_tensors(activation: Activation | None, low: Tensor, high: Tensor, side: str) -> dict[str, Tensor]:
    """What is stored of activations between low and high (0-dimensional, of the model's dtype); names start with side.

    The arithmetic is that of weights. Source: the observer static_minmax of llm-compressor.
    """
    assert activation is not None
    ends = torch.stack([low, high])[None]
    if activation.outer is not None:
        return {f"{side}_global_scale": nvfp4_global_scale(ends.abs().amax())}
    whole = Scaling(activation.element, 0, 0, activation.is_symmetric)
    _, scale, zero, _ = whole.quantize(ends)
    tensors = {f"{side}_scale": scale.reshape(1)}
    return tensors if zero is None else {**tensors, f"{side}_zero_point": zero.reshape(1)}
