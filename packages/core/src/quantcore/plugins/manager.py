"""Loading of plugins: one at a time, on demand, each failure kept apart from the rest."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import pluggy

from quantcore import settings
from quantcore.errors import (
    BackendBrokenError,
    BackendConflictError,
    QuantcoreError,
)
from quantcore.plugins import discovery, hookspecs
from quantcore.plugins.absence import absent_method, absent_module, is_absent
from quantcore.plugins.backend import Backend, import_string
from quantcore.plugins.checks import (
    as_backends,
    as_containers,
    as_description,
    as_kernels,
    broken,
    check_api,
    check_requirement,
)
from quantcore.plugins.container import Container
from quantcore.plugins.discovery import Provider
from quantcore.plugins.known import normalize_method

logger = logging.getLogger(__name__)

# Modules of quantcore that answer hooks of the floors below them; as cheap to import as the hook of a backend.
OWN_PLUGINS = ("quantcore.quantizers.hooks", "quantcore.integrations.transformers.hooks")

Kernel = TypeVar("Kernel")

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
        self._named: dict[str, Provider] = {}
        self._owners: dict[str, Provider] = {}  # of a method
        self._claims: dict[str, Provider] = {}  # of a module
        self._containers: dict[str, Container | None] = {}  # by suffix
        self._container_owners: dict[str, Provider] = {}
        self._groups_loaded: set[str] = set()
        self._packages_loaded: set[str] = set()
        self.failures: dict[str, QuantcoreError] = {}
        self.generation = 0
        for module in OWN_PLUGINS:
            self._manager.register(importlib.import_module(module), name=module)
        for module in settings.plugin_modules():
            self._load_named(module)

    @property
    def hook(self) -> Any:
        return self._manager.hook

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call a life-cycle hook of every plugin and observer.

        What an installed plugin raises is kept in `failures` and stops nothing: it may be one that the method at work
        has nothing to do with. What an object raises that this program registered is raised.
        """
        for implementation in reversed(getattr(self.hook, hook).get_hookimpls()):
            provider = self._claims.get(implementation.plugin_name)
            try:
                self._ask(implementation.plugin, hook, **arguments)
            except _ANY_FAILURE as error:
                if provider is None:
                    raise
                self._fail(f"{implementation.plugin_name}:{hook}", broken(provider, error, hook))

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
        self._containers.clear()
        self.generation += 1

    def unregister(self, plugin: object) -> None:
        """Remove an object that `register` added."""
        self._manager.unregister(plugin)
        self._containers.clear()
        self.generation += 1

    def named_providers(self) -> dict[str, Provider]:
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
        providers = discovery.providers().get(method, ())
        if not providers:
            raise absent_method(method, {*discovery.providers(), *self._named}, self.failures)
        try:
            self._keep(self._load_provided(method, providers), providers[0])
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
        for method, providers in discovery.providers().items():
            is_known = method in self._backends or method in self.failures
            if is_known or all(provider.module.partition(".")[0] != package for provider in providers):
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
        providers = (*discovery.providers().get(method, ()), *filter(None, [self._named.get(method)]))
        return str(providers[0]) if providers else None

    def match(self, config_dict: Mapping[str, Any]) -> str | None:
        """The method of a config dict that names none, as the plugins of the group quantcore.match recognise it."""
        self._load_group("quantcore.match")
        answers = self._ask_each("quantcore_match_config", config_dict=config_dict)
        return next((method for method in answers if method is not None), None)

    def match_checkpoint(self, **description: Any) -> dict[str, Any] | None:
        """The quantization_config of a checkpoint that the plugins of the group quantcore.match recognise, or None.

        description: what `quantcore_match_checkpoint` is asked with.
        """
        self._load_group("quantcore.match")
        answers = self._ask_each("quantcore_match_checkpoint", as_description, **description)
        return next((answer for answer in answers if answer is not None), None)

    def container(self, suffix: str) -> Container | None:
        """The container of files with a suffix (".gguf"), None where no plugin has it; imports that plugin alone."""
        name = suffix.lower()
        if name not in self._containers:
            self._containers[name] = self._find_container(name)
        return self._containers[name]

    def resolve_container(self, suffix: str, side: str) -> Any:
        """The function that opens the "source" or the "sink" of a container.

        Raises ValueError for a container that cannot be written, BackendBrokenError when the function cannot be had.
        """
        container = self.container(suffix)
        assert container is not None
        target = getattr(container, side)
        if not target:
            raise ValueError(f"files of the kind {suffix} can be read but not written; choose a folder as output")
        try:
            return import_string(target)
        except _ANY_FAILURE as error:
            provider = self._container_owners[container.suffix]
            raise broken(provider, error, f"{side} {target!r} of container {suffix}") from error

    def _find_container(self, suffix: str) -> Container | None:
        group, name = "quantcore.containers", suffix.removeprefix(".")
        if _claim(group, name) in self.failures:
            raise self.failures[_claim(group, name)]
        for provider in discovery.providers(group).get(name, ()):
            self._import_plugin(provider)
        for implementation in self.hook.quantcore_containers.get_hookimpls():
            provider = self._provider_of(implementation)
            try:
                found = as_containers(self._ask(implementation.plugin, "quantcore_containers"))
            except _ANY_FAILURE as error:
                self._fail(f"{provider.module}:quantcore_containers", broken(provider, error, "quantcore_containers"))
                continue
            for container in found:
                if container.suffix == suffix:
                    self._container_owners[suffix] = provider
                    return container
        return None

    def kernels(self, kind: type[Kernel]) -> list[Kernel]:
        """Kernels of the loaded backends, of the plugins of the group quantcore.kernels and of QUANTCORE_PLUGINS.

        A plugin that fails to give objects of that kind is left out, and its error kept in `failures`.
        """
        self._load_group("quantcore.kernels")
        check = partial(as_kernels, kind=kind)
        found = [kernel for kernels in self._ask_each("quantcore_kernels", check) for kernel in kernels]
        for method, backend in self._backends.items():
            owner = self._owners[method]
            for target in backend.kernels:
                try:
                    found += check([import_string(target)()], owner)
                except _ANY_FAILURE as error:  # one backend's kernels must not stop another method
                    self._fail(target, broken(owner, error, f"kernels {target!r}"))
        return found

    def _load_provided(self, method: str, providers: tuple[Provider, ...]) -> Backend:
        if len(providers) > 1:
            owners = " and ".join(str(provider) for provider in providers)
            raise BackendConflictError(
                f"method {method!r} is claimed by {owners}; uninstall one, or name one in "
                f"QUANTCORE_DISABLE_PLUGINS={providers[-1].distribution}"
            )
        provider = providers[0]
        check_requirement(method, provider)
        backends = {backend.method: backend for backend in self._import_backends(provider)}
        if method not in backends:
            raise BackendBrokenError(
                f"{provider} claims method {method!r}, but its module {provider.module!r} provides "
                f"{', '.join(sorted(backends)) or 'no backend'}; report this to its authors"
            )
        return check_api(backends[method], provider)

    def _load_named(self, module: str) -> None:
        provider = Provider(module, module, f"{module} (QUANTCORE_PLUGINS)", "", is_installed=False)
        try:
            for backend in self._import_backends(provider):
                self._add_named(check_api(backend, provider), provider)
        except QuantcoreError as error:
            self._fail(module, absent_module(module) if is_absent(module, error.__cause__) else error)

    def _add_named(self, backend: Backend, provider: Provider) -> None:
        other = self._named.get(backend.method)
        if other is not None:
            self._backends.pop(backend.method, None)
            error = BackendConflictError(
                f"method {backend.method!r} is claimed by {other} and {provider}; name only one"
            )
            self.failures[backend.method] = error
            raise error
        self._named[backend.method] = provider
        self._keep(backend, provider)

    def _keep(self, backend: Backend, provider: Provider) -> None:
        self._backends[backend.method] = backend
        self._owners[backend.method] = provider
        self.generation += 1

    def _fail(self, name: str, error: QuantcoreError) -> None:
        """Keep an error that nobody is waiting for."""
        self.failures[name] = error
        logger.warning("%s", error)

    def avoid(self, group: str, name: str, reason: str) -> None:
        """Never import what has a name in an entry-point group; to who asks for it, it is broken for the reason."""
        for provider in discovery.providers(group).get(name, ()):
            self.failures[_claim(group, name)] = BackendBrokenError(
                f"plugin module {provider.module!r} of {provider} is installed but broken: it {reason}; uninstall it, "
                f"or name it in QUANTCORE_DISABLE_PLUGINS={provider.distribution}"
            )

    def load_groups(self) -> None:
        """Import the plugins of every group but that of methods; failures are kept in `failures`."""
        self._load_group("quantcore.match")
        self._load_group("quantcore.kernels")
        for name in discovery.providers("quantcore.containers"):
            try:
                self.container(f".{name}")
            except QuantcoreError as error:
                self._fail(_claim("quantcore.containers", name), error)

    def try_claim(self, group: str, name: str) -> None:
        """Import what has a name in a group and ask it what that group is asked; what it raises does not matter."""
        for provider in discovery.providers(group).get(name, ()):
            with contextlib.suppress(*_ANY_FAILURE):
                plugin = self._import_plugin(provider)
                for answer in self._ask(plugin, hookspecs.HOOK_OF[group], **hookspecs.ASKED_WITH.get(group, {})) or ():
                    list(answer)

    def _load_group(self, group: str) -> None:
        if group in self._groups_loaded:
            return
        self._groups_loaded.add(group)
        for name, providers in discovery.providers(group).items():
            for provider in providers if _claim(group, name) not in self.failures else ():
                try:
                    self._import_plugin(provider)
                except QuantcoreError as error:
                    self._fail(_claim(group, name), error)

    def _import_backends(self, provider: Provider) -> list[Backend]:
        plugin = self._import_plugin(provider)
        try:
            return as_backends(self._ask(plugin, "quantcore_backends"))
        except QuantcoreError:
            raise
        except _ANY_FAILURE as error:
            raise broken(provider, error) from error

    def _import_plugin(self, provider: Provider) -> Any:
        """Import and register a plugin module once, turning every failure into BackendBrokenError."""
        try:
            plugin = importlib.import_module(provider.module)
        except _ANY_FAILURE as error:
            raise broken(provider, error) from error
        if not self._manager.is_registered(plugin):
            self._register_module(plugin, provider)
        return plugin

    def _register_module(self, plugin: Any, provider: Provider) -> None:
        try:
            self._manager.register(plugin, name=provider.module)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            if self._manager.is_registered(plugin):
                self._manager.unregister(plugin)  # else every later check would find its faults again
            raise broken(provider, error) from error
        self._claims[provider.module] = provider

    def _ask(self, plugin: object, hook: str, **arguments: Any) -> Any:
        """One plugin's answer to a hook."""
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        return self._manager.subset_hook_caller(hook, others)(**arguments)

    def _ask_each(
        self, hook: str, check: Callable[[Any, Provider], Any] = lambda answer, _: answer, **arguments: Any
    ) -> Iterator[Any]:
        """Each plugin's answer to a hook, checked; a plugin that fails is left out and its error kept."""
        for implementation in reversed(getattr(self.hook, hook).get_hookimpls()):
            provider = self._provider_of(implementation)
            try:
                answer = check(self._ask(implementation.plugin, hook, **arguments), provider)
            except _ANY_FAILURE as error:
                self._fail(f"{implementation.plugin_name}:{hook}", broken(provider, error, hook))
            else:
                yield answer

    def _provider_of(self, implementation: pluggy.HookImpl) -> Provider:
        """Who an implementation of a hook comes from; what this program registered is known by its class's module."""
        name = implementation.plugin_name
        own = Provider(name, getattr(implementation.plugin, "__module__", name), "this program", "")
        return self._claims.get(name, own)


def _claim(group: str, name: str) -> str:
    """The key in `failures` of what has a name in a group."""
    return name if group == discovery.GROUP else f"{group}:{name}"


@functools.lru_cache(maxsize=1)
def plugins() -> Plugins:
    """The plugins of this process. `reset()` forgets them."""
    return Plugins()


def reset() -> None:
    """Forget every loaded plugin and kept failure, and look again at what is installed."""
    plugins.cache_clear()
    discovery.clear_cache()
