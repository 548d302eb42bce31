"""Loading of plugins: one at a time, on demand, each failure kept apart from the rest."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import importlib_metadata
import pluggy

from quantcore import settings
from quantcore.errors import (
    BackendBrokenError,
    BackendConflictError,
    BackendNotInstalledError,
    BackendVersionError,
    QuantcoreError,
    UnknownMethodError,
)
from quantcore.plugins import discovery, hookspecs
from quantcore.plugins.backend import API_VERSION, Backend
from quantcore.plugins.discovery import Claim
from quantcore.plugins.known import KNOWN_METHODS, install_line, normalize_method

logger = logging.getLogger(__name__)


class Plugins:
    """Loaded plugins and what went wrong with the others.

    `hook` calls every loaded plugin; `failures` maps a method or module name to the error that loading it raised.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("quantcore")
        self._manager.add_hookspecs(hookspecs)
        self._backends: dict[str, Backend] = {}
        self._named: dict[str, Claim] = {}
        self._groups_loaded: set[str] = set()
        self.failures: dict[str, QuantcoreError] = {}
        for module in settings.plugin_modules():
            self._load_named(module)

    @property
    def generation(self) -> int:
        """A number that grows with every backend that is loaded."""
        return len(self._backends)

    @property
    def hook(self) -> Any:
        return self._manager.hook

    def register(self, plugin: object) -> None:
        """Add an object that implements hooks, such as a life-cycle observer. Raises ValueError when it is there."""
        self._manager.register(plugin)

    def unregister(self, plugin: object) -> None:
        """Remove an object that `register` added."""
        self._manager.unregister(plugin)

    def named_claims(self) -> dict[str, Claim]:
        """Methods of the modules that QUANTCORE_PLUGINS names."""
        return dict(self._named)

    def backend(self, method: str) -> Backend:
        """The backend of a method, imported now if it was not yet.

        Raises UnknownMethodError, BackendNotInstalledError, BackendVersionError, BackendBrokenError or
        BackendConflictError; a failure is kept in `failures` and raised again at the next call.
        """
        method = normalize_method(method)
        if method in self._backends:
            return self._backends[method]
        if method in self.failures:
            raise self.failures[method]
        claims = discovery.claims().get(method, ())
        if not claims:
            raise self._absent(method)
        try:
            self._backends[method] = self._load_claimed(method, claims)
        except QuantcoreError as error:
            self.failures[method] = error
            raise
        return self._backends[method]

    def match(self, config_dict: Mapping[str, Any]) -> str | None:
        """The method of a config dict that names none, as the plugins of the group quantcore.match recognise it."""
        self._load_group("quantcore.match")
        method: str | None = self.hook.quantcore_match_config(config_dict=config_dict)
        return method

    def kernels(self) -> list[Any]:
        """Kernels of the plugins of the group quantcore.kernels and of QUANTCORE_PLUGINS."""
        self._load_group("quantcore.kernels")
        return [kernel for kernels in self.hook.quantcore_kernels() for kernel in kernels]

    def loaded_backends(self) -> list[Backend]:
        """Backends that were asked for so far."""
        return list(self._backends.values())

    def _load_claimed(self, method: str, claims: tuple[Claim, ...]) -> Backend:
        if len(claims) > 1:
            owners = " and ".join(str(claim) for claim in claims)
            raise BackendConflictError(
                f"method {method!r} is claimed by {owners}; uninstall one, or name one in "
                f"QUANTCORE_DISABLE_PLUGINS={claims[-1].distribution}"
            )
        claim = claims[0]
        _check_requirement(method, claim)
        backends = {backend.method: backend for backend in self._import_backends(claim)}
        if method not in backends:
            raise BackendBrokenError(
                f"{claim} claims method {method!r}, but its module {claim.module!r} provides "
                f"{', '.join(sorted(backends)) or 'no backend'}; report this to its authors"
            )
        return _check_api(backends[method], claim)

    def _load_named(self, module: str) -> None:
        claim = Claim(module, module, f"{module} (QUANTCORE_PLUGINS)", "")
        try:
            for backend in self._import_backends(claim):
                self._add_named(_check_api(backend, claim), claim)
        except QuantcoreError as error:
            self.failures[module] = error
            logger.warning("%s", error)

    def _add_named(self, backend: Backend, claim: Claim) -> None:
        other = self._named.get(backend.method)
        if other is not None:
            self._backends.pop(backend.method, None)
            raise BackendConflictError(f"method {backend.method!r} is claimed by {other} and {claim}; name only one")
        self._named[backend.method] = claim
        self._backends[backend.method] = backend

    def _load_group(self, group: str) -> None:
        if group in self._groups_loaded:
            return
        self._groups_loaded.add(group)
        for name, claims in discovery.claims(group).items():
            for claim in claims:
                try:
                    self._import_plugin(claim)
                except QuantcoreError as error:
                    self.failures[f"{group}:{name}"] = error

    def _import_backends(self, claim: Claim) -> list[Backend]:
        plugin = self._import_plugin(claim)
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        try:
            answers = self._manager.subset_hook_caller("quantcore_backends", others)()
            return [_check_backend(backend) for backends in answers for backend in _as_iterable(backends)]
        except QuantcoreError:
            raise
        except Exception as error:  # whatever a stranger's plugin raises must not break another method
            raise _broken(claim, error) from error

    def _import_plugin(self, claim: Claim) -> Any:
        """Import and register a plugin module once, turning every failure into BackendBrokenError."""
        try:
            plugin = importlib.import_module(claim.module)
            if not self._manager.is_registered(plugin):
                self._manager.register(plugin, name=claim.module)
                self._manager.check_pending()
        except Exception as error:  # a plugin may fail in any way; the error is kept and names the culprit
            raise _broken(claim, error) from error
        return plugin

    def _absent(self, method: str) -> QuantcoreError:
        installed = ", ".join(sorted({*discovery.claims(), *self._named})) or "none"
        failed = "".join(f"\nplugin {name} failed: {error}" for name, error in self.failures.items())
        if method in KNOWN_METHODS:
            return BackendNotInstalledError(
                f"method {method!r} is known but not installed; {install_line(method)}. Installed: {installed}{failed}"
            )
        candidates = sorted({*KNOWN_METHODS, *discovery.claims(), *self._named})
        near = difflib.get_close_matches(method, candidates, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return UnknownMethodError(
            f"quant_method {method!r:.80} is unknown; {hint}Known: {', '.join(candidates)}. "
            f"Installed: {installed}{failed}"
        )


@functools.lru_cache(maxsize=1)
def plugins() -> Plugins:
    """The plugins of this process. `reset()` forgets them."""
    return Plugins()


def reset() -> None:
    """Forget every loaded plugin and kept failure, and look again at what is installed."""
    plugins.cache_clear()
    discovery.clear_cache()


def _check_requirement(method: str, claim: Claim) -> None:
    """Compare the running quantcore with what the distribution's metadata requires."""
    from packaging.requirements import Requirement

    from quantcore import __version__

    for line in importlib_metadata.requires(claim.distribution) or ():
        requirement = Requirement(line)
        if requirement.name.lower() == "quantcore" and not requirement.specifier.contains(
            __version__, prereleases=True
        ):
            raise BackendVersionError(
                f"method {method!r}: {claim} needs quantcore{requirement.specifier}, this is {__version__}; "
                f"pip install --upgrade quantcore {claim.distribution}"
            )


def _check_api(backend: Backend, claim: Claim) -> Backend:
    if backend.api != API_VERSION:
        old = claim.distribution if backend.api < API_VERSION else "quantcore"
        raise BackendVersionError(
            f"method {backend.method!r}: {claim} was made for plugin interface {backend.api}, this quantcore has "
            f"{API_VERSION}; {old} is too old: pip install --upgrade {old}"
        )
    return backend


def _check_backend(backend: object) -> Backend:
    if not isinstance(backend, Backend):
        raise TypeError(f"quantcore_backends must give Backend objects, got {type(backend).__name__}")
    return backend


def _as_iterable(backends: object) -> Iterable[object]:
    if not isinstance(backends, Iterable):
        raise TypeError(f"quantcore_backends must give an iterable of Backend, got {type(backends).__name__}")
    return backends


def _broken(claim: Claim, error: BaseException) -> BackendBrokenError:
    cause = f"{type(error).__name__}: {error}"
    return BackendBrokenError(
        f"plugin module {claim.module!r} of {claim} is installed but broken: {cause}; reinstall or upgrade it"
    )
