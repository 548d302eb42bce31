"""Quantized layers whose weight is dequantized once for many forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from quantcore.calibration.replay import forward_as
from quantcore.formats.base import WeightFormat, multiply
from quantcore.nn.linear import QuantizedLinear


class DequantizedOnce:
    """The quantized layers among some modules; each keeps its float weight from its first call on, if it shall.

    A format that quantizes its input is left to its own `linear`.
    """

    def __init__(self, modules: Iterable[nn.Module], *, keeps: bool = True) -> None:
        layers = [module for module in modules if isinstance(module, QuantizedLinear)]
        plain = [layer for layer in layers if type(layer.format).linear is WeightFormat.linear]
        self._forwards = [(layer, _forward(layer, keeps)) for layer in plain]

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """A block in which the layers multiply by their float weights."""
        with contextlib.ExitStack() as stack:
            for layer, forward in self._forwards:
                stack.enter_context(forward_as(layer, forward))
            yield


def _forward(layer: QuantizedLinear, keeps: bool) -> Callable[[Tensor], Tensor]:
    weight: Tensor | None = None

    def forward(x: Tensor) -> Tensor:
        nonlocal weight
        dtype = layer.format.compute_torch_dtype or x.dtype
        known = weight if weight is not None and weight.dtype == dtype else layer.dequantize(dtype)
        weight = known if keeps else None
        return multiply(x, known, layer.bias)

    return forward
