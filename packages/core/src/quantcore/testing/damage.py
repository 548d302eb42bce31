"""Ways in which the conformance suite damages stored tensors, and the names that an error must then hold."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.nn.module import QuantizedModule

SURPLUS = "no_tensor_of_any_format"


def misshape(tensor: Tensor) -> Tensor:
    """The same values with one more dimension."""
    return tensor[None]


def recast(tensor: Tensor) -> Tensor:
    """The values in a dtype that no format stores this tensor in."""
    return tensor.to(torch.float32 if tensor.dtype in (torch.int32, torch.int64) else torch.int64)


def required_names(layer: QuantizedModule) -> list[str]:
    """Names of the stored tensors, but for those whose absence marks a variant of the format that has none."""
    return [name for name in layer.stored if _is_required(layer, name)]


def damage_each(layer: QuantizedModule, missing: str) -> tuple[dict[str, Tensor], list[str]]:
    """A layer's stored tensors with as many kinds of damage at once as it has tensors for, and the damaged names.

    The tensor `missing` is left out, a surplus one added, and of the others that kernels read one gets a wrong dtype
    and one a wrong shape. Metadata stays whole: without it a format cannot know what to expect of the rest.
    """
    tensors = dict(layer.stored)
    del tensors[missing]
    metadata = {spec.name for spec in layer.format.tensor_specs(layer.shape) if spec.metadata}
    victims = [name for name in tensors if name not in metadata]
    for name, damage in zip(victims, (recast, misshape), strict=False):
        tensors[name] = damage(tensors[name])
    tensors[SURPLUS] = torch.zeros(1)
    return tensors, [missing, SURPLUS, *victims[:2]]


def _is_required(layer: QuantizedModule, name: str) -> bool:
    rest = {other: tensor for other, tensor in layer.stored.items() if other != name}
    try:
        found = layer.format.read(rest, layer.shape)
    except (KeyError, ValueError):
        return True
    return name in [spec.name for spec in found.tensor_specs(layer.shape)]
