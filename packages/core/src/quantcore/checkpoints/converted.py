"""Float tensors that transformers joins, cuts or turns when it loads a checkpoint of an architecture."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantcore.checkpoints.read import Checkpoint, Derived, is_plain
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError


def converted(
    model: nn.Module, checkpoint: Checkpoint, converters: Sequence[Any], besides: Collection[str] = ()
) -> Checkpoint:
    """A checkpoint, under the names of the model, with the tensors that transformers' converters make of its own.

    besides: parameters of the model that are left as they are stored. What is quantized is no input of a converter.
    Raises CheckpointError naming the tensors that a converter cannot take.
    """
    built = _AsBuilt(model)
    own = built.tensors
    groups: dict[str, tuple[Any, dict[str, str]]] = {}  # the first target -> converter, {tensor: its pattern}
    for name in sorted(checkpoint.headers, key=_by_number):
        found = _converter_of(name, converters) if is_plain([checkpoint.headers[name]]) else None
        if found is None or found[1] not in own or found[1] in besides:
            continue
        converter, target, pattern = found
        groups.setdefault(target, (converter, {}))[1][name] = pattern
    derived = [
        _derived(built, checkpoint, target, converter, patterns) for target, (converter, patterns) in groups.items()
    ]
    changed = [each for each in derived if each is not None]
    return checkpoint.with_derived(changed) if changed else checkpoint


class _AsBuilt:
    """What converters ask of a model, as it is before its layers are exchanged for others."""

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = model.config
        self.tensors: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name]


def _converter_of(name: str, converters: Sequence[Any]) -> tuple[Any, str, str] | None:
    """The first converter that takes a tensor, the parameter that it makes, and the pattern that hits."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return converter, target, pattern
    return None


def _derived(
    model: _AsBuilt, checkpoint: Checkpoint, target: str, converter: Any, patterns: Mapping[str, str]
) -> Derived | None:
    """What a converter makes of tensors; None where it leaves its one tensor alone, having seen its shape."""
    make = partial(_convert, model, target, converter, patterns)
    empty = {name: checkpoint.headers[name].empty() for name in patterns}
    try:
        made = make(empty)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: {', '.join(patterns)} cannot be made {target}, which the model has: {error}"
        ) from error
    if made.keys() == empty.keys() and all(made[name] is tensor for name, tensor in empty.items()):
        return None
    headers = {name: Header("", tensor.dtype, tuple(tensor.shape), 0) for name, tensor in made.items()}
    return Derived(tuple(patterns), headers, make)


def _convert(
    model: _AsBuilt, target: str, converter: Any, patterns: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a converter makes of tensors, by the names of the model; target: the first of them."""
    fresh = copy.deepcopy(converter)
    fresh.collected_tensors, fresh.layer_targets = defaultdict(list), defaultdict(set)
    for name, pattern in patterns.items():
        fresh.add_tensor(target, name, pattern, tensors[name])
    made = fresh.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names with numbers as transformers does: experts.2 before experts.10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
