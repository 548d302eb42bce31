"""Fused weights of experts, as checkpoints store them, taken apart into the weights of linear layers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from torch import Tensor, nn

from quantcore.nn.experts import FusedWeight, QuantizedExperts

FusedWeights = Mapping[str, tuple[str, FusedWeight]]  # parameter -> its module, and what it is made of


def fused_in(model: nn.Module, whole: Container[str] = ()) -> FusedWeights:
    """The 3-D weights of the experts of a model that were taken apart. whole: names of those that are left out."""
    return {
        f"{name}.{weight.name}": (name, weight)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for weight in module.fused
        if f"{name}.{weight.name}" not in whole
    }


def taken_apart(tensors: Iterable[tuple[str, Tensor]], fused: FusedWeights) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, and for a fused weight that of each layer: views of it. Keeps no tensor that was taken."""
    for name, tensor in tensors:
        if name in fused:
            module, weight = fused[name]
            yield from ((f"{module}.{layer}.weight", matrix) for layer, matrix in weight.matrices(tensor))
        else:
            yield name, tensor
        del tensor
