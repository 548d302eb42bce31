"""Which module a stored tensor belongs to, known by what the formats of a method call their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def by_owner(tensors: Mapping[str, T], suffixes: Iterable[str] = ()) -> dict[str, dict[str, T]]:
    """Tensors by the module that owns them: {module: {suffix: tensor}}, in their order.

    suffixes: what formats store beside "weight" and "bias", dots included ("weight._data", "meta.scale.s"). A name that
    ends with none of them belongs to the module before its last dot, and no module has the name of a tensor: beside
    "fc.weight", the owner of "fc.weight.absmax" is "fc".
    """
    known = set(suffixes)
    groups: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        owner = _owner(name, tensors, known)
        groups.setdefault(owner, {})[name[len(owner) + 1 :] if owner else name] = tensor
    return groups


def is_bias(suffix: str) -> bool:
    """Whether a tensor of a module is added to something: a layer's bias, or a router's `e_score_correction_bias`."""
    return suffix == "bias" or (suffix.endswith("_bias") and "." not in suffix)


def by_parameter(names: Iterable[str], suffixes: Iterable[str]) -> dict[str, dict[str, str]]:
    """The names that store 3-D parameters whole: {parameter: {suffix: name}}.

    suffixes: what formats call their tensors there ("weight_blocks"); a name goes on from the parameter's own with what
    follows "weight".
    """
    tails = {suffix.removeprefix("weight"): suffix for suffix in suffixes}
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        tail = next((tail for tail in tails if tail and name.endswith(tail)), None)
        if tail is not None:
            groups.setdefault(name.removesuffix(tail), {})[tails[tail]] = name
    return groups


def _owner(name: str, names: Collection[str], suffixes: Collection[str]) -> str:
    parts = name.split(".")
    if suffixes:
        for end in range(len(parts)):  # the longest suffix first
            owner = ".".join(parts[:end])
            if ".".join(parts[end:]) in suffixes and owner not in names:
                return owner
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in names:
            return ".".join(parts[: end - 1])
    return ".".join(parts[:-1])
