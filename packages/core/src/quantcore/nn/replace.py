"""Finding and exchanging modules in a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from quantcore.nn.module import QuantizedModule


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place that a dotted name gives."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Every module with a quantized weight, by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            yield name, module
