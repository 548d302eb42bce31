"""Scales of activations that are stored with a layer, from the range that calibration data have."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from quantcore_misc.compressed_tensors.scaling import Scaling, nvfp4_global_scale
from quantcore_misc.ranges import extents

if TYPE_CHECKING:
    from quantcore.sdk import Activation, Block
    from quantcore_misc.compressed_tensors.weight import CompressedWeight


def measure(block: Block) -> None:
    """Have scales stored with the layers of a block whose inputs or outputs are static, from the range that these have.

    A layer that no token reaches keeps the scale 1.
    """
    for side in ("input", "output"):
        for name, extent in extents(block, side).items():
            layer = block.layers[name]
            weight_format = cast("CompressedWeight", layer.weight_format)
            activation, dtype = weight_format.activation(side), weight_format.torch_dtype
            assert activation is not None
            tensors = range_tensors(activation, extent.low.amin().to(dtype), extent.high.amax().to(dtype), side)
            block.store_besides(name, {suffix: t.to(layer.dense.weight.device) for suffix, t in tensors.items()})


def round_block(block: Block) -> None:
    """Round every layer of a block by its format."""
    for name, layer in block.layers.items():
        block.replace(name, layer.weight_format.quantize(layer.dense.weight))


def range_tensors(activation: Activation, low: Tensor, high: Tensor, side: str) -> dict[str, Tensor]:
    """What is stored of activations between low and high, of the model's dtype; names start with side.

    low, high: 0-dimensional, or [heads] for a scale [heads, 1, 1] each. The arithmetic is that of weights.
    Source: the observer static_minmax of llm-compressor.
    """
    ends = torch.stack([low, high], -1).view(-1, 2)
    if activation.outer is not None:
        return {f"{side}_global_scale": nvfp4_global_scale(ends.abs().amax())}
    shape = (1,) if low.ndim == 0 else (len(low), 1, 1)
    _, scale, zero, _ = Scaling(activation.element, 1, 0, activation.is_symmetric).quantize(ends)
    tensors = {f"{side}_scale": scale.reshape(shape)}
    return tensors if zero is None else {**tensors, f"{side}_zero_point": zero.reshape(shape)}
