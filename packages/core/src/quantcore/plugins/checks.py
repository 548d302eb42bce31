"""What a plugin must satisfy before its methods and kernels are used, and the errors for those that do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantcore._metadata import metadata
from quantcore.errors import BackendBrokenError, BackendVersionError
from quantcore.plugins.backend import API_VERSION, Backend
from quantcore.plugins.discovery import Claim

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel


def check_requirement(method: str, claim: Claim) -> None:
    """Raise BackendVersionError when the distribution's metadata asks for another version of quantcore."""
    from quantcore import __version__

    for requirement in _requirements(claim):
        applies = requirement.marker is None or requirement.marker.evaluate()
        if not applies or requirement.name.lower() != "quantcore":
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise BackendVersionError(
                f"method {method!r}: {claim} needs quantcore{requirement.specifier}, this is {__version__}; "
                f"pip install --upgrade quantcore {claim.distribution}"
            )


def check_api(backend: Backend, claim: Claim) -> Backend:
    """The backend, or BackendVersionError when it was made for another plugin interface."""
    if backend.api != API_VERSION:
        old = claim.distribution if backend.api < API_VERSION else "quantcore"
        raise BackendVersionError(
            f"method {backend.method!r}: {claim} was made for plugin interface {backend.api}, this quantcore has "
            f"{API_VERSION}; {old} is too old: pip install --upgrade {old}"
        )
    return backend


def as_backends(answers: Iterable[object]) -> list[Backend]:
    """The backends in the answers to `quantcore_backends`. Raises TypeError for anything else."""
    return _flatten(answers, "quantcore_backends", Backend)


def as_kernels(answers: Iterable[object]) -> list[Kernel]:
    """The kernels in the answers to `quantcore_kernels`. Raises TypeError for anything else."""
    from quantcore.kernels.dispatch import Kernel

    return _flatten(answers, "quantcore_kernels", Kernel)


def broken(claim: Claim, error: BaseException, part: str = "") -> BackendBrokenError:
    """The error that says which part of whose plugin failed, and why. part: of the module; all of it when empty."""
    where = f"{part} of " if part else ""
    cause = f"{type(error).__name__}: {error}"
    return BackendBrokenError(
        f"{where}plugin module {claim.module!r} of {claim} is installed but broken: {cause}; reinstall or upgrade it"
    )


def _requirements(claim: Claim) -> list[Any]:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return [Requirement(line) for line in metadata.requires(claim.distribution) or ()]
    except metadata.PackageNotFoundError:  # metadata without a name; the plugin may still work
        return []
    except InvalidRequirement as error:
        raise broken(claim, error) from error


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
