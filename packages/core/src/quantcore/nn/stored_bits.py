"""Stored tensors as bits: compared, moved and pickled whatever their dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_WORDS = (torch.uint16, torch.uint32, torch.uint64)


def is_unpicklable(tensor: Tensor) -> bool:
    """Whether torch 2.13 cannot pickle a tensor of this dtype, a float of 8 bits or an unsigned word."""
    return tensor.dtype in _WORDS or (tensor.is_floating_point() and tensor.itemsize == 1)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A tensor as a parameter that is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def is_same(found: Tensor | None, expected: Tensor) -> bool:
    """Whether a tensor is another one, bit for bit."""
    if found is None or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(as_bytes(found), as_bytes(expected))


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8, flat."""
    return tensor.detach().reshape(math.prod(tensor.shape)).view(torch.uint8)


def without_cast(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn on the bytes of a tensor: it moves like any other, but a cast of floats finds nothing to cast."""
    data = as_bytes(tensor)
    moved = fn(data)
    if moved.dtype != torch.uint8:  # `Module.type` casts integers too
        moved = data.to(moved.device)
    return moved.view(tensor.dtype).reshape(tensor.shape)


def picklable(
    parameters: Mapping[str, nn.Parameter | None],
) -> tuple[dict[str, nn.Parameter | None], dict[str, torch.dtype]]:
    """Parameters of which each can be pickled, and the dtypes of those that are bytes for that."""
    dtypes = {name: held.dtype for name, held in parameters.items() if held is not None and is_unpicklable(held)}
    raw = {name: frozen(parameters[name].view(torch.uint8)) for name in dtypes}  # type: ignore[union-attr]
    return {**parameters, **raw}, dtypes
