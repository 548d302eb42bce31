"""How methods reach quantcore: hook specifications, discovery, and the descriptor a backend hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcore import _lazy

if TYPE_CHECKING:
    from quantcore.plugins.backend import Backend as Backend
    from quantcore.plugins.hookspecs import hookimpl as hookimpl

__getattr__, __dir__ = _lazy.attributes(
    __name__, {"Backend": "quantcore.plugins.backend", "hookimpl": "quantcore.plugins.hookspecs"}
)
