"""Finding and exchanging modules in a model, and what its float ones are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
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


def usual_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of a model's float values outside of quantized weights; None where it has none."""
    stored = {id(tensor) for _, module in quantized_modules(model) for tensor in module.stored.values()}
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stored:
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)
