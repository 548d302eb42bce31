"""The quantized layers of a checkpoint, as a quantizer is told of them when it says what else to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.nn.replace import quantized_modules


@dataclass(frozen=True)
class StoredLayer:
    """One quantized weight of a checkpoint.

    name: of its module, as the checkpoint calls it. shape: of the weight. tensors: what stores it, by suffix, on the
    meta device; its bias is not among them.
    """

    name: str
    weight_format: WeightFormat
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def planned(cls, name: str, weight_format: WeightFormat, shape: tuple[int, ...]) -> StoredLayer:
        """A layer that will be quantized; tensors whose length follows from the values have a typical one."""
        specs = weight_format.tensor_specs(shape)
        tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
        return cls(name, weight_format, shape, tensors)

    def written_as(self, weight_format: WeightFormat, tensors: Mapping[str, Tensor]) -> StoredLayer:
        """The same layer with the tensors and the format that it has got."""
        empty = {suffix: torch.empty_like(tensor, device="meta") for suffix, tensor in tensors.items()}
        return dataclasses.replace(self, weight_format=weight_format, tensors=empty)


def stored_layers(model: nn.Module, rename: Callable[[str], str] = str) -> Iterator[StoredLayer]:
    """The quantized layers of a model. rename: from a tensor's name in the model to that in the checkpoint."""
    for name, module in quantized_modules(model):
        suffix = next(iter(module.stored))
        full = rename(module.full_name(f"{name}." if name else "", suffix))
        empty = {key: torch.empty_like(tensor, device="meta") for key, tensor in module.stored.items()}
        yield StoredLayer(_without(full, suffix), module.format, module.shape, empty)


def _without(name: str, suffix: str) -> str:
    """The name of what holds a tensor: a module, or a 3-D parameter, whose tensors are called "parameter_blocks"."""
    if name.endswith(f".{suffix}"):
        return name.removesuffix(f".{suffix}")
    return name if name == suffix else name.removesuffix(suffix.removeprefix("weight"))
