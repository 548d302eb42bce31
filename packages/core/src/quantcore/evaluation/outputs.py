"""How far each quantized layer of a model is from the float one, on the inputs that the float model gives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.nn import QuantizedExperts, QuantizedModule


def output_errors(model: nn.Module, reference: nn.Module, ids: Tensor) -> dict[str, float]:
    """|| y - y' || / || y || of every quantized layer that the reference has in the same place, by its name.

    Frobenius norms over the tokens ids [B, T]; y is the output of the reference's layer, y' that of the quantized one
    on the same inputs, so that rounded activations and transforms count. A layer that no token reaches is left out.
    """
    squares: dict[str, list[float]] = {}
    modules = dict(reference.named_modules())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedModule)}
    layers |= {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedExperts)}
    handles = [
        modules[name].register_forward_hook(
            partial(_compare, squares.setdefault(name, [0.0, 0.0]), layer), with_kwargs=True
        )
        for name, layer in layers.items()
        if name in modules
    ]
    try:
        with torch.inference_mode():
            reference(ids.to(next(reference.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: math.sqrt(error / norm) for name, (error, norm) in squares.items() if norm}


def _compare(
    sums: list[float],
    layer: Callable[..., Any],
    module: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    expected: Any,
) -> None:
    """A hook that adds to the squares of a layer's error and output."""
    if not isinstance(expected, Tensor):
        return
    found = layer(*inputs, **named)
    sums[0] += float((found.float() - expected.float()).square().sum(dtype=torch.float64))
    sums[1] += float(expected.float().square().sum(dtype=torch.float64))
