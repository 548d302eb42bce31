"""Scales of activations that are stored with a layer, from the range that calibration data have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.calibration.block import token_rows
from quantcore.calibration.statistics import MinMax
from quantcore_misc.compressed_tensors.scaling import Scaling, nvfp4_global_scale

if TYPE_CHECKING:
    from quantcore.calibration.block import Block
    from quantcore.formats.activation import Activation
    from quantcore_misc.compressed_tensors.weight import CompressedWeight


def measure(block: Block) -> None:
    """Have scales stored with the layers of a block whose inputs or outputs are static, from the range that these have.

    A layer that no token reaches keeps the scale 1.
    """
    formats: dict[str, CompressedWeight] = {name: layer.weight_format for name, layer in block.layers.items()}  # type: ignore[misc]
    inputs = [name for name, each in formats.items() if needs_range(each.input)]
    outputs = [name for name, each in formats.items() if needs_range(each.output)]
    found = block.collect(inputs, lambda layer: MinMax(layer.dense.shape[1])) if inputs else {}
    for name, extent in found.items():
        _store(block, name, formats[name], extent, "input")
    for name, extent in _output_extents(block, outputs).items():
        _store(block, name, formats[name], extent, "output")


def _output_extents(block: Block, names: Sequence[str]) -> dict[str, MinMax]:
    """The range of what the named layers give."""
    found = {name: MinMax(block.layers[name].dense.shape[0]) for name in names}
    calls = zip(block.samples, block.calls(names), strict=True) if names else ()
    for sample, called in calls:
        for name, call in called.items():
            found[name].update(token_rows(call.output, sample.mask))
    for extent in found.values():
        block.merge(extent)
    return found


def _store(block: Block, name: str, weight_format: CompressedWeight, extent: MinMax, side: str) -> None:
    if not extent.tokens:
        return
    dtype, device = weight_format.torch_dtype, block.layers[name].dense.weight.device
    activation = weight_format.input if side == "input" else weight_format.output
    assert activation is not None
    tensors = range_tensors(activation, extent.low.amin().to(dtype), extent.high.amax().to(dtype), side)
    block.store_besides(name, {suffix: tensor.to(device) for suffix, tensor in tensors.items()})


def round_block(block: Block) -> None:
    """Round every layer of a block by its format."""
    for name, layer in block.layers.items():
        block.replace(name, layer.weight_format.quantize(layer.dense.weight))


def needs_range(activation: Activation | None) -> bool:
    """Whether a layer stores something of the range of its activations."""
    return activation is not None and (activation.is_static or activation.outer is not None)


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
