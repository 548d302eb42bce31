"""The metadata of installed packages, which a checkout run from source reads without `importlib_metadata` too."""

from __future__ import annotations

try:
    import importlib_metadata as metadata
except ModuleNotFoundError:  # the older copy in the standard library has all that is used here
    from importlib import metadata  # type: ignore[no-redef]

__all__ = ["metadata"]
