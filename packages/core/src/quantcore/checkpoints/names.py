"""How checkpoints call what a model holds, where the two differ: tensors that transformers renames, and experts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from quantcore import transformers_names as inside
from quantcore.checkpoints.converted import converted
from quantcore.checkpoints.read import Checkpoint
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
    """The same tensors under the names that the model has for them, joined and cut as transformers does for it.

    Experts stay as they are stored, and so does what is quantized.
    Raises CheckpointError when two would have one name, and for tensors that cannot be joined.
    """
    conversions = _conversions(model, add_legacy=True)
    rename = name_in_model(model, conversions)
    view = checkpoint.renamed({name: rename(name) for name in checkpoint.headers})
    converters = [each for each in conversions if hasattr(each, "operations")]
    return converted(model, view, converters, _put_together(model, conversions)) if converters else view


def split_stored_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Take apart the experts that a checkpoint, with the names of the model, stores one by one."""
    names = part_names(model)
    if not names:
        return  # the usual case, and a checkpoint has many names
    owners = {name[: dot.start()] for name in checkpoint.headers for dot in re.finditer(r"\.", name)}
    biased = [name.removesuffix(".bias") for name in checkpoint.headers if name.endswith(".bias")]
    split_experts(model, owners, names, biased)


def module_names(checkpoint: Checkpoint) -> dict[str, str]:
    """{module: what the source calls it} for the modules of a renamed checkpoint that have another name there."""
    return renamed_modules((name, checkpoint.stored_name(name)) for name in checkpoint.headers)


def renamed_modules(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    """As `module_names`, by the names of tensors: (here, in the source)."""
    found: dict[str, str] = {}
    for name, stored in tensors:
        if stored == name:
            continue
        here, there = name.split("."), stored.split(".")
        while here and there and here[-1] == there[-1]:
            here.pop()
            there.pop()
            found.setdefault(".".join(here), ".".join(there))
        # What is left differs; a part that both have at the end belongs to the layer or is a suffix of it.
    return {here: there for here, there in found.items() if here != there}


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
    """The name in the model of a tensor in a checkpoint; names that the model has are kept.

    A prefix is changed only where that leads to a module: whether a checkpoint has it depends on who wrote it.
    """
    plain = _renamings(conversions)
    renamings = [each for each in conversions if not hasattr(each, "operations")]
    prefix = getattr(model, inside.BASE_PREFIX, "")

    def rename(name: str) -> str:
        renamed = _renamed(name, plain)
        names = (renamed, _renamed(name, renamings)) if len(renamings) > len(plain) else (renamed,)
        found = (
            other
            for each in (name, *names)
            for other in (each, *_other_prefix(each, prefix))
            if _has_owner(model, other)
        )
        return next(found, renamed)

    return lambda name: name if _has_owner(model, name) else rename(name)


def _other_prefix(name: str, prefix: str) -> tuple[str, ...]:
    """The name without the prefix of the base model, or with it."""
    if not prefix:
        return ()
    return (name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else f"{prefix}.{name}",)


def _conversions(model: nn.Module, add_legacy: bool = False) -> list[Any]:
    """What transformers (since 5.0) does to the names and tensors of a checkpoint of this model; none for others.

    add_legacy: with the names of releases that write no more.
    """
    transformers = sys.modules.get("transformers")  # a model of transformers has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return []
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4: checkpoints are named as models are
        return []
    found: list[Any] = getattr(conversion_mapping, inside.CONVERSION_MAPPING)(model, add_legacy=add_legacy)
    return found


def _renamings(conversions: Iterable[Any]) -> list[Any]:
    """The conversions that change names alone. A change of prefix depends on how a model was loaded: left out."""
    return [
        each for each in conversions if not hasattr(each, "operations") and type(each).__name__ != inside.CHANGES_PREFIX
    ]


def _put_together(model: nn.Module, conversions: Iterable[Any]) -> set[str]:
    """The 3-D parameters of experts that checkpoints store one by one, for which the experts are taken apart."""
    parts = _parts_by_target(conversions)
    return {
        parameter
        for name, module in fused_experts(model)
        for weight in fused_weights(module)
        for parameter in (f"{name}.{weight.name}",)
        if any(f".{parameter}".endswith(target) for target in parts)
    }


def _parts_by_target(conversions: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """{end of a parameter's name: layers of one expert} of the conversions that merge experts."""
    parts = {}
    for each in conversions:
        merges = any(type(operation).__name__ == inside.MERGES_EXPERTS for operation in getattr(each, "operations", ()))
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
    if isinstance(module, nn.Linear | nn.Embedding | QuantizedModule):
        return True
    return any(parts[0].isdigit() or parts[0].startswith(weight.name) for weight in fused_weights(module))
