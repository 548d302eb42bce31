"""Every environment variable that quantcore reads, in one place. Values are read at call time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

_forced: ContextVar[str | None] = ContextVar("quantcore_forced_kernel", default=None)


def plugin_modules() -> list[str]:
    """Names of plugin modules to load although they are not installed (QUANTCORE_PLUGINS)."""
    return _split("QUANTCORE_PLUGINS")


def disabled_plugins() -> frozenset[str]:
    """Methods, modules or distributions that discovery skips (QUANTCORE_DISABLE_PLUGINS)."""
    return frozenset(_split("QUANTCORE_DISABLE_PLUGINS"))


def forced_kernel() -> str | None:
    """Name of the only kernel that may run, or None for the usual choice: `forced_to`, else QUANTCORE_KERNEL."""
    return _forced.get() or os.environ.get("QUANTCORE_KERNEL", "").strip() or None


@contextmanager
def forced_to(kernel: str) -> Iterator[None]:
    """Within, and in this thread or task alone, this is the only kernel that may run."""
    token = _forced.set(kernel)
    try:
        yield
    finally:
        _forced.reset(token)


def allow_non_finite() -> bool:
    """Whether checkpoints with NaN or infinity among their scales are read (QUANTCORE_ALLOW_NON_FINITE=1)."""
    return os.environ.get("QUANTCORE_ALLOW_NON_FINITE", "") not in ("", "0")


def allow_unapplied_scales() -> bool:
    """Whether stored scales of keys and values may stay unapplied (QUANTCORE_ALLOW_UNAPPLIED_SCALES=1)."""
    return os.environ.get("QUANTCORE_ALLOW_UNAPPLIED_SCALES", "") not in ("", "0")


def autotune() -> bool:
    """Whether Triton launches that are not known for this device are measured at first use (QUANTCORE_AUTOTUNE=1)."""
    return os.environ.get("QUANTCORE_AUTOTUNE", "") not in ("", "0")


def cache_folder() -> Path:
    """Where measurements of this machine are kept (QUANTCORE_CACHE, else quantcore in XDG_CACHE_HOME or ~/.cache)."""
    named = os.environ.get("QUANTCORE_CACHE", "").strip()
    base = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(named or f"{base}/quantcore").expanduser()


def hub_folder() -> Path:
    """Where the hub's client keeps what it downloaded (HF_HUB_CACHE, else hub in HF_HOME or ~/.cache/huggingface)."""
    home = os.environ.get("HF_HOME", "").strip() or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE", "").strip() or f"{home}/hub").expanduser()


class Torchrun(NamedTuple):
    """One of several processes that torchrun started. local_rank, local_processes: of those on this machine."""

    rank: int
    local_rank: int
    local_processes: int


def torchrun() -> Torchrun | None:
    """What torchrun says of this process (RANK, LOCAL_RANK, LOCAL_WORLD_SIZE); None where it started one, or none."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    return Torchrun(rank, local, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def is_first_process() -> bool:
    """Whether this process shows what it does: of those that torchrun started, the first alone does."""
    found = torchrun()
    return found is None or found.rank == 0


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
