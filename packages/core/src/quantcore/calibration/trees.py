"""Tensors inside the arguments and results of modules: tuples, lists, dicts, and the model outputs of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in a structure of tuples, lists and mappings, depth first."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from leaves(value)


def map_leaves(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The structure with each tensor replaced by function of it; what holds no tensor is kept as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if next(leaves(tree), None) is None:
        return tree
    if isinstance(tree, Mapping):
        return _rebuilt(tree, {key: map_leaves(function, value) for key, value in tree.items()})
    values = [map_leaves(function, value) for value in tree]
    if hasattr(tree, "_fields"):  # a named tuple
        return type(tree)(*values)
    return type(tree)(values)


def flatten(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a structure, and the structure without them, which `unflatten` fills again."""
    tensors: list[Tensor] = []
    place = torch.empty(0)

    def take(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return place

    skeleton = map_leaves(take, tree)
    return tensors, skeleton


def unflatten(tensors: Iterable[Tensor], skeleton: Any) -> Any:
    """The structure that `flatten` took apart, with tensors in the same order."""
    remaining = iter(tensors)
    return map_leaves(lambda place: next(remaining), skeleton)


def _rebuilt(tree: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    return values if type(tree) is dict else type(tree)(**values)


def to_device(tree: Any, device: torch.device | None) -> Any:
    """The structure with every tensor on a device; tree itself for None, or where nothing moves."""
    if device is None or all(tensor.device == device for tensor in leaves(tree)):
        return tree
    return map_leaves(lambda tensor: tensor.to(device), tree)


def main_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns: its first tensor. Raises TypeError when it returns none."""
    found = next(leaves(output), None)
    if found is None:
        raise TypeError(f"a block returned {type(output).__name__} without a tensor")
    return found
