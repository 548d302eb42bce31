"""Every environment variable that quantcore reads, in one place. Values are read at call time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def plugin_modules() -> list[str]:
    """Names of plugin modules to load although they are not installed (QUANTCORE_PLUGINS)."""
    return _split("QUANTCORE_PLUGINS")


def disabled_plugins() -> frozenset[str]:
    """Methods, modules or distributions that discovery skips (QUANTCORE_DISABLE_PLUGINS)."""
    return frozenset(_split("QUANTCORE_DISABLE_PLUGINS"))


def forced_kernel() -> str | None:
    """Name of the only kernel that may run, or None for the usual choice (QUANTCORE_KERNEL)."""
    return os.environ.get("QUANTCORE_KERNEL", "").strip() or None


@contextmanager
def forced_to(kernel: str) -> Iterator[None]:
    """Within, QUANTCORE_KERNEL names this kernel."""
    before = os.environ.get("QUANTCORE_KERNEL")
    os.environ["QUANTCORE_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ["QUANTCORE_KERNEL"]
        else:
            os.environ["QUANTCORE_KERNEL"] = before


def autotune() -> bool:
    """Whether Triton launches that are not known for this device are measured at first use (QUANTCORE_AUTOTUNE=1)."""
    return os.environ.get("QUANTCORE_AUTOTUNE", "") not in ("", "0")


def cache_folder() -> Path:
    """Where measurements of this machine are kept (QUANTCORE_CACHE, else quantcore in XDG_CACHE_HOME or ~/.cache)."""
    named = os.environ.get("QUANTCORE_CACHE", "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(named or f"{base}/quantcore").expanduser()


def golden_folder() -> str | None:
    """Folder of the whole golden set, which tests run instead of the selection in the repository (QUANTCORE_GOLDEN)."""
    return os.environ.get("QUANTCORE_GOLDEN", "").strip() or None


def debug() -> bool:
    """Whether the command line shows tracebacks of known errors (QUANTCORE_DEBUG=1)."""
    return os.environ.get("QUANTCORE_DEBUG", "") not in ("", "0")


def no_color() -> bool:
    """Whether output stays without colour on a terminal too (NO_COLOR, https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def in_force() -> dict[str, str]:
    """The environment variables that are set and change what quantcore does, or where and on what it runs."""
    heeded = (name for name in sorted(os.environ) if name.startswith("QUANTCORE_") or name in _OTHERS)
    return {name: os.environ[name] for name in heeded}


# Read by torch, by the hub's client, or by the terminal output.
_OTHERS = frozenset(
    (
        "CUDA_VISIBLE_DEVICES",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HIP_VISIBLE_DEVICES",
        "MKL_NUM_THREADS",
        "NO_COLOR",
        "OMP_NUM_THREADS",
        "TRITON_INTERPRET",
    )
)


def _split(variable: str) -> list[str]:
    return [part for part in (word.strip() for word in os.environ.get(variable, "").split(",")) if part]
