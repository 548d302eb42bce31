"""Which methods are installed, read from names alone: no plugin is imported here."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantcore import settings
from quantcore._metadata import metadata
from quantcore.plugins.known import KNOWN_METHODS

GROUP = "quantcore"
GROUPS = (GROUP, "quantcore.match", "quantcore.kernels", "quantcore.containers")


@dataclass(frozen=True)
class Provider:
    """One entry point: a distribution says that a module provides a method."""

    name: str
    module: str
    distribution: str
    version: str
    summary: str = ""  # of the distribution
    is_installed: bool = True  # False for a module that QUANTCORE_PLUGINS names

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


@dataclass(frozen=True)
class MethodInfo:
    """A method as `methods()` lists it."""

    method: str
    installed: bool
    distributions: tuple[str, ...]
    extra: str | None
    summary: str
    is_available: bool = True  # whether a backend has it


def providers(group: str = GROUP) -> dict[str, tuple[Provider, ...]]:
    """Entry points of a group by name, less the disabled ones; more than one value means a conflict."""
    disabled = settings.disabled_plugins()
    found: dict[str, dict[str, Provider]] = {}
    for provider in _installed(group):
        if disabled.isdisjoint((provider.name, provider.module, provider.distribution)):
            # The same distribution can be seen twice on sys.path (an editable install beside its build folder).
            found.setdefault(provider.name, {}).setdefault(provider.distribution.lower().replace("_", "-"), provider)
    return {name: tuple(by_distribution.values()) for name, by_distribution in sorted(found.items())}


def methods() -> list[MethodInfo]:
    """Installed and known methods, sorted by name; imports neither torch nor an installed plugin.

    Methods of modules named in QUANTCORE_PLUGINS are included: those modules are imported, for only they know.
    """
    installed, summaries = {}, {}
    for name, found in providers().items():
        installed[name] = tuple(str(provider) for provider in found)
        summaries[name] = found[0].summary
    if settings.plugin_modules():
        from quantcore.plugins.manager import plugins

        for method, provider in plugins().named_providers().items():
            installed[method] = (str(provider),)
    names = sorted({*installed, *KNOWN_METHODS})
    return [_describe(method, installed.get(method, ()), summaries.get(method, "")) for method in names]


def without(method: str) -> str | None:
    """The installed distribution that would provide a known method but does not; None where none is, or by wish."""
    if method in settings.disabled_plugins():
        return None
    others = [info for info in methods() if info.installed and info.extra == KNOWN_METHODS[method].extra]
    return others[0].distributions[0] if others else None


def clear_cache() -> None:
    """Forget what is installed, for a process that installs a plugin while it runs."""
    _installed.cache_clear()


def _describe(method: str, distributions: tuple[str, ...], summary: str) -> MethodInfo:
    known = KNOWN_METHODS.get(method)
    if known is None:
        return MethodInfo(method, bool(distributions), distributions, None, summary)
    is_available = known.is_available or bool(distributions)
    return MethodInfo(method, bool(distributions), distributions, known.extra, known.summary, is_available)


@functools.lru_cache(maxsize=8)
def _installed(group: str) -> tuple[Provider, ...]:
    return tuple(Provider(entry.name, _module_of(entry), *_owner_of(entry)) for entry in _entry_points(group))


def _entry_points(group: str) -> Iterable[Any]:
    try:
        found: Iterable[Any] = metadata.entry_points(group=group)
    except ValueError:  # importlib-metadata 9 gives none at all when that of any distribution is malformed
        return [entry for owner in metadata.distributions() for entry in _well_formed(owner, group)]
    return found


def _well_formed(distribution: Any, group: str) -> Iterable[Any]:
    try:
        return list(distribution.entry_points.select(group=group))
    except ValueError:
        return []


def _module_of(entry: Any) -> str:
    try:
        return str(entry.module)
    except (AttributeError, ValueError):  # a malformed entry point; importing what it says fails, and names its owner
        return str(entry.value)


def _owner_of(entry: Any) -> tuple[str, str, str]:
    """Name, version and summary of an entry point's distribution; ("?", "", "") after a broken uninstall.

    The lines are read here, for the metadata library loads the e-mail parser to read them: half of the time.
    """
    text = (entry.dist.read_text("METADATA") or entry.dist.read_text("PKG-INFO") or "") if entry.dist else ""
    head = text.partition("\n\n")[0].splitlines()
    fields = dict(line.split(": ", 1) for line in head if line.startswith(("Name: ", "Version: ", "Summary: ")))
    name, version, summary = (fields.get(key, "").strip() for key in ("Name", "Version", "Summary"))
    return name or "?", version, summary
