"""What is said of methods and modules that are not there, and how to get them."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from quantcore.distribution import install_hint, upgrade_hint
from quantcore.errors import BackendNotInstalledError, QuantcoreError, UnknownMethodError
from quantcore.plugins import discovery
from quantcore.plugins.known import FLOATS, KNOWN_METHODS, SETTINGS


def absent_method(method: str, here: Collection[str], failures: Mapping[str, QuantcoreError]) -> QuantcoreError:
    """The error for a method that no plugin gives. here: those that are given; failures: of plugins, by name."""
    installed = ", ".join(sorted(here)) or "none"
    failed = "".join(f"\nplugin {name} failed: {error}" for name, error in failures.items())
    if method in KNOWN_METHODS:
        return BackendNotInstalledError(
            f"method {method!r} is known but {_how_to_get(method)}. Installed: {installed}{failed}"
        )
    candidates = sorted({*KNOWN_METHODS, *here})
    near = difflib.get_close_matches(method, candidates, 1)
    hint = _meant(method) or (f"did you mean {near[0]!r}?" if near else "")
    lists = (
        f"Known: {', '.join(candidates)}. Installed: {'all of these' if set(candidates) <= set(here) else installed}"
    )
    return UnknownMethodError(f"quant_method {method!r:.80} is unknown{f'; {hint} ' if hint else '. '}{lists}{failed}")


def is_absent(module: str, error: BaseException | None) -> bool:
    """Whether an import failed for there is no such module or package, not for what stands in it."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def absent_module(module: str) -> QuantcoreError:
    return BackendNotInstalledError(
        f"no module {module!r}, which QUANTCORE_PLUGINS names; check its spelling, or add its folder to PYTHONPATH"
    )


def _meant(name: str) -> str:
    """What to ask for in place of a name that is a setting of a method, or no quantization at all."""
    folded = name.strip().lower()
    if folded in SETTINGS:
        return f"{name} is a setting: --method {SETTINGS[folded]}."
    return f"{name} is a dtype of float weights: load the model with dtype={name}." if folded in FLOATS else ""


def _how_to_get(method: str) -> str:
    known, lacking = KNOWN_METHODS[method], discovery.without(method)
    if not known.is_available:
        return "not available yet: no backend has it"
    if lacking:
        return f"not in {lacking}; {upgrade_hint(lacking.split()[0])}"
    return f"not installed; {install_hint(known.extra)}"
