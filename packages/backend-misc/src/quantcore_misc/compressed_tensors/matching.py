"""Which modules a list of targets or a skip list names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantcore.sdk import patterns, spellings

if TYPE_CHECKING:
    from torch import nn

    from quantcore_misc.compressed_tensors.schemes import Scheme

_REGEX = "re:"
_ALIASES = {"LinearBase": "Linear"}  # the class of vLLM that stands for linear layers


def matches_name(name: str, target: str) -> bool:
    """Whether a target is the module's full name, or a `re:` pattern that matches from the start of the name."""
    if target.startswith(_REGEX):
        return any(patterns.matches(target.removeprefix(_REGEX), spelled) for spelled in spellings(name))
    return target in spellings(name)


def matches_class(module: nn.Module, target: str) -> bool:
    """Whether a target is the name of the module's class or of one that it derives from."""
    return any(target in (cls.__name__, _ALIASES.get(cls.__name__)) for cls in type(module).__mro__)


def is_named(name: str, module: nn.Module, targets: Iterable[str]) -> bool:
    """Whether one of the targets names a module, by name or by class."""
    return any(matches_name(name, target) or matches_class(module, target) for target in targets)


def scheme_of(name: str, module: nn.Module, schemes: Sequence[Scheme]) -> Scheme | None:
    """The scheme of the first target that hits a module: names and patterns, sorted, then classes, sorted."""
    by_target = {target: scheme for scheme in reversed(schemes) for target in scheme.targets}
    ordered = sorted(by_target)
    hit = next((target for target in ordered if matches_name(name, target)), None)
    if hit is None:
        hit = next((target for target in ordered if matches_class(module, target)), None)
    return None if hit is None else by_target[hit]


def check_pattern(target: str, label: str) -> None:
    """Raise ValueError naming label for a `re:` target that is no regular expression."""
    if target.startswith(_REGEX):
        patterns.check(target.removeprefix(_REGEX), label)
