"""Weights that a model shares between two places, where a checkpoint stores each of them apart: the file is right."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.stream import slots


def untie_stored_apart(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give each place of a shared parameter one of its own where the checkpoint stores different values for them.

    checkpoint: under the names of the model. Parameters that are stored alike stay shared. Reads only what is shared.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    targets = slots(model)
    for name in checkpoint.headers:
        if name in targets and isinstance(targets[name].tensor, nn.Parameter):
            groups[id(targets[name].tensor)].append(name)
    for first, *others in groups.values():
        for name in others:
            if _differ(checkpoint, first, name):
                slot = targets[name]
                alone = nn.Parameter(torch.empty_like(slot.tensor, device="meta"), slot.tensor.requires_grad)
                slot.module._parameters[slot.attribute] = alone
                mark_untied(model, name)


def mark_untied(model: nn.Module, name: str) -> None:
    """Have a model of transformers know that a parameter, by name, is not shared any more."""
    tied = getattr(model, inside.TIED_WEIGHTS, None)
    if isinstance(tied, dict):
        tied.pop(name, None)
    config: Any = getattr(model, "config", None)
    parts: tuple[Any, ...] = (config, inside.text_config(config))
    for part in parts:
        if getattr(part, inside.TIES_EMBEDDINGS, False):
            setattr(part, inside.TIES_EMBEDDINGS, False)


def _differ(checkpoint: Checkpoint, one: str, other: str) -> bool:
    first, second = checkpoint.headers[one], checkpoint.headers[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return True
    stored = dict(checkpoint.stream((one, other)))
    # Bytes: NaN equals itself, and floats of 8 bits cannot be compared.
    bytes_of = [stored[name].reshape(-1).view(torch.uint8) for name in (one, other)]
    return not torch.equal(*bytes_of)
