"""How methods reach quantcore: hook specifications, discovery, and the descriptor a backend hands over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcore import _lazy

if TYPE_CHECKING:
    from quantcore.plugins.backend import Backend as Backend, Guide as Guide, PerLayer as PerLayer, Refusal as Refusal
    from quantcore.plugins.container import Container as Container
    from quantcore.plugins.hookspecs import hookimpl as hookimpl

__getattr__, __dir__ = _lazy.attributes(
    __name__,
    {
        "Backend": "quantcore.plugins.backend",
        "Guide": "quantcore.plugins.backend",
        "Refusal": "quantcore.plugins.backend",
        "PerLayer": "quantcore.plugins.backend",
        "Container": "quantcore.plugins.container",
        "hookimpl": "quantcore.plugins.hookspecs",
    },
)
