"""Import of optional packages, with the pip line that installs them when they are absent."""

from __future__ import annotations

import importlib
from typing import Any

from quantcore.distribution import install_hint
from quantcore.errors import MissingExtraError


def require(package: str, extra: str) -> Any:
    """The imported package. Raises MissingExtraError naming the extra of quantcore that brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(f"this needs {package}; {install_hint(extra)}") from error
