"""Whether a server takes what a config writes, by what backends say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from quantcore.plugins.backend import Backend, Guide, Refusal


def refusals(guide: Guide, config: Mapping[str, Any], server: str) -> list[Refusal]:
    """What a method says that a server refuses of a config, given as in config.json."""
    return [refusal for refusal in guide.refused if refusal.server == server and _applies(refusal, config)]


def renamed(guide: Guide, config: Mapping[str, Any], server: str) -> dict[str, Any]:
    """The settings by which the files get the names that a server reads, with the same numbers in them."""
    found: dict[str, Any] = {}
    for refusal in refusals(guide, config, server):
        if refusal.renames:
            found.update(refusal.instead)
    return found


def check_served(backend: Backend, config: Mapping[str, Any], server: str, others: Iterable[Backend] = ()) -> None:
    """Raise ValueError where a server does not take what a config writes, with what it takes.

    others: backends among which a user may choose instead.
    """
    guide = backend.guide
    if server not in guide.served_by:
        able = ", ".join(sorted(other.method for other in others if server in other.guide.served_by))
        raise ValueError(
            f"{server} does not read what {backend.method} writes; methods that it reads: {able or 'none'}"
        )
    for found, instead in objections(guide, config, server):
        raise ValueError(f"{server} does not take {backend.method} with {found}; use {instead}")


def objections(guide: Guide, config: Mapping[str, Any], server: str) -> list[tuple[str, str]]:
    """The settings of a config that a server refuses, and those that work, as name=value; not where names differ."""
    return [
        (_shown(_found(refusal.settings, config)), _shown(refusal.instead))
        for refusal in refusals(guide, config, server)
        if not refusal.renames
    ]


def _applies(refusal: Refusal, config: Mapping[str, Any]) -> bool:
    if len(_found(refusal.settings, config)) < len(refusal.settings):
        return False
    return not refusal.unless or len(_found(refusal.unless, config)) < len(refusal.unless)


def _found(settings: Mapping[str, Sequence[Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a config has with one of the values, with the value."""
    found = {}
    for name, values in settings.items():
        fitting = [value for value in _values(config, name.split(".")) if not values or _is_among(value, values)]
        if fitting:
            found[name] = fitting[0]
    return found


def _is_among(value: Any, values: Sequence[Any]) -> bool:
    """Whether a value is one of some; 1 and true are two."""
    return any(value == each and type(value) is type(each) for each in values)


def _values(value: Any, path: Sequence[str]) -> Iterator[Any]:
    """What a path leads to within dicts; `*` leads to every entry."""
    if not path:
        yield value
    elif isinstance(value, Mapping):
        name, *rest = path
        for key in value if name == "*" else (name,) if name in value else ():
            yield from _values(value[key], rest)


def _shown(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in settings.items())
