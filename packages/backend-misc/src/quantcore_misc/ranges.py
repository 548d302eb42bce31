"""The range of what reaches and leaves layers, over calibration data: what static scales are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantcore.sdk import statistics, token_rows

if TYPE_CHECKING:
    from quantcore.sdk import Block


def extents(block: Block, side: str) -> dict[str, statistics.MinMax]:
    """By name the range of the "input" or "output" of each layer that stores something of it.

    It is taken over all samples and processes, without masked tokens; a layer that no token reaches is left out.
    """
    roundings = {name: layer.weight_format.activation(side) for name, layer in block.layers.items()}  # type: ignore[attr-defined]
    names = [name for name, rounding in roundings.items() if rounding is not None and rounding.is_measured]
    if not names:
        return {}
    if side == "input":
        found = block.collect(names, lambda layer: statistics.MinMax(layer.dense.shape[1]))
    else:
        found = _of_outputs(block, names)
    return {name: extent for name, extent in found.items() if extent.tokens}


def _of_outputs(block: Block, names: Sequence[str]) -> dict[str, statistics.MinMax]:
    layers = {name: block.layers[name].dense for name in names}
    found = {name: statistics.MinMax(dense.shape[0], dense.weight.device) for name, dense in layers.items()}
    for sample, called in zip(block.samples, block.calls(names), strict=True):
        for name, call in called.items():
            found[name].update(token_rows(call.output, sample.mask))
    for extent in found.values():
        block.merge(extent)
    return found
