"""The metadata of installed packages, which a checkout run from source reads without `importlib_metadata` too."""

from __future__ import annotations

try:
    import importlib_metadata as metadata
except ModuleNotFoundError:  # the older copy in the standard library has all that is used here
    from importlib import metadata  # type: ignore[no-redef]

from quantcore.distribution import DISTRIBUTION

__all__ = ["metadata", "own_version"]


def own_version() -> str:
    """The version of quantcore."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from source through PYTHONPATH
        return "0.1.0"
