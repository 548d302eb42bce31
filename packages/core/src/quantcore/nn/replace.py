"""Finding and exchanging modules in a model, and what its float ones are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from quantcore.memory import give_back_freed_memory
from quantcore.nn.module import QuantizedModule

# What hooks of forward and backward passes a module has, and how each is called.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place that a dotted name gives, with the hooks of the one that stands there.

    The two share their hooks, so that a handle still removes what it registered.
    """
    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    if any(getattr(old, hooks) for hooks in _HOOKS):
        vars(new).update({hooks: getattr(old, hooks) for hooks in _HOOKS})
    setattr(model.get_submodule(parent), attribute, new)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    """Every module with a quantized weight, by name. Raises TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}: {model!r:.80}; load a folder first")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            yield name, module


def prepare(model: nn.Module) -> int:
    """Let kernels hold the weights of a model in layouts of their own, see `QuantizedModule.prepare`; how many they do.

    Weights that several layers share are left as they are.
    """
    layers = list(quantized_modules(model))
    holders = Counter(id(tensor) for _, layer in layers for tensor in layer.held)
    alone = [layer for _, layer in layers if all(holders[id(tensor)] == 1 for tensor in layer.held)]
    held = sum(layer.prepare() for layer in alone)
    if held:
        give_back_freed_memory()  # of the tensors that the layouts replace
    return held


def usual_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of a model's float values outside of quantized weights; None where it has none."""
    stored = {id(tensor) for _, module in quantized_modules(model) for tensor in module.held}
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in stored:
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)
