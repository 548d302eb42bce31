"""How checkpoints call what a model holds, where the two differ: tensors that transformers renames, and experts."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from quantcore.checkpoints.read import Checkpoint
from quantcore.errors import CheckpointError
from quantcore.nn.experts import fused_experts, fused_weights, split_experts
from quantcore.nn.module import QuantizedModule

Rename = Callable[[str], str]


def fit_names(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """A float checkpoint under the names of the model, in which experts that are stored one by one are taken apart.

    Raises what `named_as` raises.
    """
    view = named_as(model, checkpoint)
    split_stored_experts(model, view)
    return view


def named_as(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors under the names that the model has for them.

    Raises CheckpointError when two would have one name.
    """
    rename = name_in_model(model, _conversions(model))
    view = copy.copy(checkpoint)
    view.headers = {rename(name): header for name, header in checkpoint.headers.items()}
    if len(view.headers) < len(checkpoint.headers):
        raise CheckpointError(
            f"{checkpoint.directory}: {len(checkpoint.headers)} tensors have {len(view.headers)} names in the model; "
            "the checkpoint is of two architectures at once"
        )
    return view


def split_stored_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Take apart the experts that a checkpoint, with the names of the model, stores one by one."""
    names = part_names(model)
    if not names:
        return  # the usual case, and a checkpoint has many names
    owners = {name[: dot.start()] for name in checkpoint.headers for dot in re.finditer(r"\.", name)}
    biased = [name.removesuffix(".bias") for name in checkpoint.headers if name.endswith(".bias")]
    split_experts(model, owners, names, biased)


def part_names(model: nn.Module) -> dict[str, dict[str, tuple[str, ...]]]:
    """What checkpoints call the linear layers of an expert: {experts module: {parameter: names}}.

    Holds what transformers says of its own models; others have the usual names.
    """
    experts = list(fused_experts(model))
    parts = _parts_by_target(_conversions(model)) if experts else {}
    return {
        name: {
            weight.name: found
            for weight in fused_weights(module)
            for target, found in parts.items()
            if f".{name}.{weight.name}".endswith(target)
        }
        for name, module in experts
    }


def name_in_checkpoint(model: nn.Module) -> Rename:
    """The name under which upstream saves a tensor of the model."""
    conversions = _conversions(model)
    to_model = name_in_model(model, conversions)
    reversed_ = [each.reverse_transform() for each in reversed(_renamings(conversions))]

    def rename(name: str) -> str:
        renamed = _renamed(name, reversed_)
        return renamed if to_model(renamed) == name else name

    return rename


def name_in_model(model: nn.Module, conversions: Iterable[Any]) -> Rename:
    """The name in the model of a tensor in a checkpoint; names that the model has are kept."""
    renamings = _renamings(conversions)
    return lambda name: name if _has_owner(model, name) else _renamed(name, renamings)


def _conversions(model: nn.Module) -> list[Any]:
    """What transformers (since 5.0) does to the names and tensors of a checkpoint of this model; none for others."""
    transformers = sys.modules.get("transformers")  # a model of transformers has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4: checkpoints are named as models are
        return []
    found: list[Any] = get_model_conversion_mapping(model, add_legacy=False)
    return found


def _renamings(conversions: Iterable[Any]) -> list[Any]:
    """The conversions that change names alone. A change of prefix depends on how a model was loaded: left out."""
    return [each for each in conversions if not hasattr(each, "operations") and type(each).__name__ != "PrefixChange"]


def _parts_by_target(conversions: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """{end of a parameter's name: layers of one expert} of the conversions that merge experts."""
    parts = {}
    for each in conversions:
        merges = any(type(operation).__name__ == "MergeModulelist" for operation in getattr(each, "operations", ()))
        if merges and len(each.target_patterns) == 1:
            target = "." + each.target_patterns[0].lstrip("^.")
            parts[target] = tuple(source.rpartition("*.")[2].removesuffix(".weight") for source in each.source_patterns)
    return parts


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _has_owner(model: nn.Module, name: str) -> bool:
    """Whether a name leads to a tensor of the model, or into a module that may hold a quantized weight."""
    module, parts = model, name.split(".")
    while parts and parts[0] in module._modules:
        child = module._modules[parts.pop(0)]
        if child is None:
            return False
        module = child
    if not parts or parts[0] in module._parameters or parts[0] in module._buffers:
        return True
    return isinstance(module, nn.Linear | nn.Embedding | QuantizedModule) or bool(fused_weights(module))
