"""What a plugin must satisfy before its methods and kernels are used, and the errors for those that do not."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from quantcore._metadata import metadata, own_version
from quantcore.distribution import DISTRIBUTION, upgrade_hint
from quantcore.errors import BackendBrokenError, BackendVersionError
from quantcore.plugins.backend import API_VERSION, Backend, Guide
from quantcore.plugins.container import Container
from quantcore.plugins.discovery import Provider

Kernel = TypeVar("Kernel")


def check_requirement(method: str, provider: Provider) -> None:
    """Raise BackendVersionError when the distribution's metadata asks for another version of quantcore."""
    version = own_version()
    for requirement in _requirements(provider):
        applies = requirement.marker is None or requirement.marker.evaluate()
        if not applies or requirement.name.lower().replace("_", "-") != DISTRIBUTION:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            raise BackendVersionError(
                f"method {method!r}: {provider} needs {requirement}, this is {version}; "
                f"{upgrade_hint(DISTRIBUTION, provider.distribution)}"
            )


def check_api(backend: Backend, provider: Provider) -> Backend:
    """The backend, or BackendVersionError when it was made for another plugin interface."""
    if backend.api != API_VERSION:
        old = provider.distribution if backend.api < API_VERSION else DISTRIBUTION
        raise BackendVersionError(
            f"method {backend.method!r}: {provider} was made for plugin interface {backend.api}, this quantcore has "
            f"{API_VERSION}; {old} is too old: {upgrade_hint(old)}"
        )
    return backend


def as_backends(answers: Iterable[object]) -> list[Backend]:
    """The backends in the answers to `quantcore_backends`. Raises TypeError for anything else, in their fields too."""
    backends: list[Backend] = _flatten(answers, "quantcore_backends", Backend)
    for backend in backends:
        _check_fields(backend)
    return backends


def as_kernels(answers: Iterable[object], provider: Provider, kind: type[Kernel]) -> list[Kernel]:
    """The kernels in the answers to `quantcore_kernels`, with whom they come from.

    Raises TypeError for what is not of that kind, or has fields of other types or a priority that is no number, and
    ValueError for names that QUANTCORE_KERNEL means something else by.
    """
    found: list[Any] = _flatten(answers, "quantcore_kernels", kind)
    for kernel in found:
        _check_kernel(kernel)
    package = provider.module.partition(".")[0]
    return [dataclasses.replace(kernel, provider=str(provider), package=package) for kernel in found]


def as_containers(answers: Iterable[object]) -> list[Container]:
    """The containers in the answers to `quantcore_containers`. Raises TypeError for anything else."""
    return _flatten(answers, "quantcore_containers", Container)


def as_description(answer: object, _: Provider) -> dict[str, Any] | None:
    """The answer to `quantcore_match_checkpoint`. Raises TypeError for anything but None or a dict with its method."""
    if answer is None:
        return None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("quant_method"), str):
        raise TypeError(f"quantcore_match_checkpoint must give a dict with quant_method or None, got {answer!r:.80}")
    return dict(answer)


def broken(provider: Provider, error: BaseException, part: str = "") -> BackendBrokenError:
    """The error that says which part of whose plugin failed, and why. part: of the module; all of it when empty."""
    where = f"{part} of " if part else ""
    cause = f"{type(error).__name__}: {error}"
    if not provider.is_installed:
        return BackendBrokenError(
            f"{where}plugin module {provider.module!r}, which QUANTCORE_PLUGINS names, fails: "
            f"{cause}{_line_of(error)}; mend it, or take it out of QUANTCORE_PLUGINS"
        )
    return BackendBrokenError(
        f"{where}plugin module {provider.module!r} of {provider} is installed but broken: {cause}; "
        "reinstall or upgrade it"
    )


def _line_of(error: BaseException) -> str:
    """Where an error was raised, for who is writing that module; nothing where it has no trace."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _check_kernel(kernel: Any) -> None:
    """Raise TypeError or ValueError naming the first field of a kernel that would fail where kernels are chosen."""
    label = f"Kernel({kernel.name!r:.40})"
    for name, kind in _KERNEL_FIELDS.items():
        if not isinstance(value := getattr(kernel, name), kind):
            raise TypeError(f"{label}.{name} must be {kind.__name__}, got {type(value).__name__}: {value!r:.80}")
    for name, is_needed in _KERNEL_FUNCTIONS.items():
        value = getattr(kernel, name)
        if not callable(value) and (is_needed or value is not None):
            raise TypeError(f"{label}.{name} must be a function, got {type(value).__name__}: {value!r:.80}")
    priority = kernel.priority
    if not isinstance(priority, (int, float)) or isinstance(priority, bool) or not math.isfinite(priority):
        raise TypeError(f"{label}.priority must be a finite number, got {priority!r:.60}")
    if kernel.name.strip().lower() in _RESERVED:
        raise ValueError(f"a kernel may not be named {kernel.name!r:.60}: QUANTCORE_KERNEL means others by it")
    hash(kernel)  # kernels are told apart by it


def _check_fields(backend: Backend) -> None:
    """Raise TypeError or ValueError naming the first field of a backend that holds something else than it declares."""
    label = f"Backend({backend.method!r:.40})"
    for name, kind in _FIELDS.items():
        value = getattr(backend, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{label}.{name} must be {kind.__name__}, got {type(value).__name__}: {value!r:.80}")
    for name, kind in _ITEMS.items():
        value = getattr(backend, name)
        is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_sequence or not all(isinstance(item, kind) for item in value):
            raise TypeError(f"{label}.{name} must be a sequence of {kind.__name__}, got {value!r:.80}")
    if not backend.method.strip():
        raise ValueError(f"{label}.method is empty; give the name that stands in config.json")


_FIELDS: dict[str, type] = {
    **dict.fromkeys(("method", "config", "quantizer", "summary", "solver", "upstream"), str),
    "needs_calibration": bool,
    "default": Mapping,
    "guide": Guide,
    "gaps": Mapping,
    "api": int,
}
_KERNEL_FIELDS: dict[str, type] = {"name": str, "group": str, "on_trial": bool}
_KERNEL_FUNCTIONS = {
    **dict.fromkeys(("refuse", "linear", "linear_input_grad"), True),
    **dict.fromkeys(("grouped_linear", "layout"), False),
}
_RESERVED = ("", "reference", "torch", "triton", "cpu")  # the reference, and the groups
_ITEMS: dict[str, type] = {"kernels": str, "example_configs": Mapping}


def _requirements(provider: Provider) -> list[Any]:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return [Requirement(line) for line in metadata.requires(provider.distribution) or ()]
    except metadata.PackageNotFoundError:  # metadata without a name; the plugin may still work
        return []
    except InvalidRequirement as error:
        raise broken(provider, error) from error


def _flatten(answers: Iterable[object], hook: str, kind: type[Any]) -> list[Any]:
    found: list[Any] = []
    for answer in answers:
        if not isinstance(answer, Iterable):
            raise TypeError(f"{hook} must give an iterable of {kind.__name__}, got {type(answer).__name__}")
        found.extend(answer)
    strangers = [item for item in found if not isinstance(item, kind)]
    if strangers:
        raise TypeError(f"{hook} must give {kind.__name__} objects, got {type(strangers[0]).__name__}")
    return found
