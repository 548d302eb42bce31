"""Loading of plugins: one at a time, on demand, each failure kept apart from the rest."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pluggy

from quantcore import settings
from quantcore.errors import (
    BackendBrokenError,
    BackendConflictError,
    BackendNotInstalledError,
    QuantcoreError,
    UnknownMethodError,
)
from quantcore.plugins import discovery, hookspecs
from quantcore.plugins.backend import Backend, import_string
from quantcore.plugins.checks import as_backends, as_kernels, broken, check_api, check_requirement
from quantcore.plugins.discovery import Claim
from quantcore.plugins.known import KNOWN_METHODS, install_line, normalize_method

logger = logging.getLogger(__name__)

_ANY_FAILURE = (Exception, SystemExit)  # a stranger's module may do anything on import, sys.exit included


class Plugins:
    """Loaded plugins and what went wrong with the others.

    `hook` calls every loaded plugin; `failures` maps what failed (a method, a module, a hook of a module) to its error.
    `generation` changes whenever the kernels of the loaded plugins may have.
    """

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager("quantcore")
        self._manager.add_hookspecs(hookspecs)
        self._backends: dict[str, Backend] = {}
        self._named: dict[str, Claim] = {}
        self._owners: dict[str, Claim] = {}  # of a method
        self._claims: dict[str, Claim] = {}  # of a module
        self._groups_loaded: set[str] = set()
        self._packages_loaded: set[str] = set()
        self.failures: dict[str, QuantcoreError] = {}
        self.generation = 0
        for module in settings.plugin_modules():
            self._load_named(module)

    @property
    def hook(self) -> Any:
        return self._manager.hook

    def register(self, plugin: object) -> None:
        """Add an object that implements hooks, such as a life-cycle observer.

        Raises ValueError when it is there already, or implements a hook that does not exist.
        """
        self._manager.register(plugin)
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(plugin)
            raise ValueError(str(error)) from error
        self.generation += 1

    def unregister(self, plugin: object) -> None:
        """Remove an object that `register` added."""
        self._manager.unregister(plugin)
        self.generation += 1

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
            self._keep(self._load_claimed(method, claims), claims[0])
        except QuantcoreError as error:
            self.failures[method] = error
            raise
        return self._backends[method]

    def load_package(self, package: str) -> None:
        """Load the backends that a Python package provides and that are not loaded yet, such as those of a format.

        A layer that was unpickled brings its format along, but not the kernels. Failures are kept in `failures`.
        """
        if package in self._packages_loaded:
            return
        self._packages_loaded.add(package)
        for method, claims in discovery.claims().items():
            is_settled = method in self._backends or method in self.failures
            if is_settled or all(claim.module.partition(".")[0] != package for claim in claims):
                continue
            try:
                self.backend(method)
            except QuantcoreError as error:
                self._fail(method, error)

    def resolve(self, method: str, field: str) -> Any:
        """The object that a field of a method's backend names as "module:attribute".

        Raises what `backend` raises, and BackendBrokenError when the object cannot be had.
        """
        method = normalize_method(method)
        target = getattr(self.backend(method), field)
        try:
            return import_string(target)
        except _ANY_FAILURE as error:
            self.failures[method] = broken(self._owners[method], error, f"{field} {target!r}")
            raise self.failures[method] from error

    def owner(self, method: str) -> str | None:
        """The distribution or named module that provides a method, without loading it; None when none does."""
        claims = (*discovery.claims().get(method, ()), *filter(None, [self._named.get(method)]))
        return str(claims[0]) if claims else None

    def match(self, config_dict: Mapping[str, Any]) -> str | None:
        """The method of a config dict that names none, as the plugins of the group quantcore.match recognise it."""
        self._load_group("quantcore.match")
        answers = self._ask_each("quantcore_match_config", config_dict=config_dict)
        return next((method for method in answers if method is not None), None)

    def kernels(self) -> list[Any]:
        """Kernels of the loaded backends, of the plugins of the group quantcore.kernels and of QUANTCORE_PLUGINS.

        A plugin that fails to give its kernels is left out, and its error kept in `failures`.
        """
        self._load_group("quantcore.kernels")
        found = [kernel for kernels in self._ask_each("quantcore_kernels", as_kernels) for kernel in kernels]
        for method, backend in self._backends.items():
            for target in backend.kernels:
                try:
                    found += as_kernels([import_string(target)()])
                except _ANY_FAILURE as error:  # one backend's kernels must not stop another method
                    self._fail(target, broken(self._owners[method], error, f"kernels {target!r}"))
        return found

    def _load_claimed(self, method: str, claims: tuple[Claim, ...]) -> Backend:
        if len(claims) > 1:
            owners = " and ".join(str(claim) for claim in claims)
            raise BackendConflictError(
                f"method {method!r} is claimed by {owners}; uninstall one, or name one in "
                f"QUANTCORE_DISABLE_PLUGINS={claims[-1].distribution}"
            )
        claim = claims[0]
        check_requirement(method, claim)
        backends = {backend.method: backend for backend in self._import_backends(claim)}
        if method not in backends:
            raise BackendBrokenError(
                f"{claim} claims method {method!r}, but its module {claim.module!r} provides "
                f"{', '.join(sorted(backends)) or 'no backend'}; report this to its authors"
            )
        return check_api(backends[method], claim)

    def _load_named(self, module: str) -> None:
        claim = Claim(module, module, f"{module} (QUANTCORE_PLUGINS)", "")
        try:
            for backend in self._import_backends(claim):
                self._add_named(check_api(backend, claim), claim)
        except QuantcoreError as error:
            self._fail(module, error)

    def _add_named(self, backend: Backend, claim: Claim) -> None:
        other = self._named.get(backend.method)
        if other is not None:
            self._backends.pop(backend.method, None)
            error = BackendConflictError(f"method {backend.method!r} is claimed by {other} and {claim}; name only one")
            self.failures[backend.method] = error
            raise error
        self._named[backend.method] = claim
        self._keep(backend, claim)

    def _keep(self, backend: Backend, claim: Claim) -> None:
        self._backends[backend.method] = backend
        self._owners[backend.method] = claim
        self.generation += 1

    def _fail(self, name: str, error: QuantcoreError) -> None:
        """Keep an error that nobody is waiting for."""
        self.failures[name] = error
        logger.warning("%s", error)

    def _load_group(self, group: str) -> None:
        if group in self._groups_loaded:
            return
        self._groups_loaded.add(group)
        for name, claims in discovery.claims(group).items():
            for claim in claims:
                try:
                    self._import_plugin(claim)
                except QuantcoreError as error:
                    self._fail(f"{group}:{name}", error)

    def _import_backends(self, claim: Claim) -> list[Backend]:
        plugin = self._import_plugin(claim)
        try:
            return as_backends(self._ask(plugin, "quantcore_backends"))
        except QuantcoreError:
            raise
        except _ANY_FAILURE as error:
            raise broken(claim, error) from error

    def _import_plugin(self, claim: Claim) -> Any:
        """Import and register a plugin module once, turning every failure into BackendBrokenError."""
        try:
            plugin = importlib.import_module(claim.module)
        except _ANY_FAILURE as error:
            raise broken(claim, error) from error
        if not self._manager.is_registered(plugin):
            self._register_module(plugin, claim)
        return plugin

    def _register_module(self, plugin: Any, claim: Claim) -> None:
        try:
            self._manager.register(plugin, name=claim.module)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)  # else every later check would find its faults again
            raise broken(claim, error) from error
        self._claims[claim.module] = claim

    def _ask(self, plugin: object, hook: str, **arguments: Any) -> Any:
        """One plugin's answer to a hook."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)(**arguments)

    def _ask_each(
        self, hook: str, check: Callable[[Any], Any] = lambda answer: answer, **arguments: Any
    ) -> Iterator[Any]:
        """Each plugin's answer to a hook, checked; a plugin that fails is left out and its error kept."""
        for implementation in reversed(getattr(self.hook, hook).get_hookimpls()):
            name = implementation.plugin_name
            try:
                answer = check(self._ask(implementation.plugin, hook, **arguments))
            except _ANY_FAILURE as error:
                claim = self._claims.get(name, Claim(name, name, "this program", ""))
                self._fail(f"{name}:{hook}", broken(claim, error, hook))
            else:
                yield answer

    def _absent(self, method: str) -> QuantcoreError:
        installed = ", ".join(sorted({*discovery.claims(), *self._named})) or "none"
        failed = "".join(f"\nplugin {name} failed: {error}" for name, error in self.failures.items())
        if method in KNOWN_METHODS:
            found = discovery.without(method)
            hint = f", once a release has it: {found} lacks it" if found else ""
            return BackendNotInstalledError(
                f"method {method!r} is known but not installed; {install_line(method)}{hint}. "
                f"Installed: {installed}{failed}"
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
