"""What is done to tensors between checkpoints and files: whole rows change places, packed or not, and norms shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantcore_misc.gguf.architectures import HEADS, KEY_HEADS, PLUS_ONE

_COUNTS = {HEADS: "num_attention_heads", KEY_HEADS: "num_key_value_heads"}


def into_file(tensor: Tensor, change: str, config: Mapping[str, Any]) -> Tensor:
    """A tensor of a checkpoint as files hold it; config: config.json."""
    if change == PLUS_ONE:
        return tensor.float() + 1
    return _interleave(tensor, _heads(change, config), 2) if change in _COUNTS else tensor


def out_of_file(tensor: Tensor, change: str, config: Mapping[str, Any]) -> Tensor:
    """The inverse of `into_file`."""
    if change == PLUS_ONE:
        return tensor.float() - 1
    heads = _heads(change, config)
    return _interleave(tensor, heads, tensor.shape[0] // (2 * max(heads, 1))) if change in _COUNTS else tensor


def _heads(change: str, config: Mapping[str, Any]) -> int:
    return int(config.get(_COUNTS.get(change, "")) or config.get("num_attention_heads") or 1)


def _interleave(tensor: Tensor, heads: int, parts: int) -> Tensor:
    """Rows of each head, in so many parts, taken one of each part in turn: rotary pairs come side by side, or apart.

    Raises ValueError where heads do not divide the rows.
    """
    if tensor.shape[0] % (2 * heads):
        raise ValueError(f"{tensor.shape[0]} rows are not those of {heads} heads of an even size")
    split = tensor.reshape(heads, parts, -1, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def weave(parts: Sequence[Tensor], is_turned: bool) -> Tensor:
    """Tensors of a file as the one of a checkpoint whose last dimension has a number of each in turn."""
    turned = [part.transpose(-1, -2) if is_turned else part for part in parts]
    return torch.stack(turned, -1).flatten(-2).contiguous()


def unweave(tensor: Tensor, count: int, is_turned: bool) -> list[Tensor]:
    """The inverse of `weave`, of so many parts."""
    parts = tensor.unflatten(-1, (-1, count)).unbind(-1)
    return [(part.transpose(-1, -2) if is_turned else part).contiguous() for part in parts]


def woven_shape(shape: tuple[int, ...], count: int, is_turned: bool) -> tuple[int, ...]:
    """The shape of what `weave` makes of so many tensors of a shape."""
    turned = (*shape[:-2], shape[-1], shape[-2]) if is_turned else shape
    return (*turned[:-1], turned[-1] * count)
