"""What a model keeps in floats, by reason."""

from __future__ import annotations

from collections.abc import Mapping

from quantcore.cli.report.grids import grid
from quantcore.cli.report.text import Table

_SHOWN = 4  # kinds of a reason


def kept_float(caption: str, left: Mapping[str, str]) -> Table:
    """A row for each reason: how many modules, and of which kinds."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    rows = [(reason, str(len(names)), _kinds(names)) for reason, names in by_reason.items()]
    return Table(caption, ("why", "modules", "which"), rows or [("nothing does", "0", "–")], has_words=True)


def _kinds(names: list[str]) -> str:
    kinds = grid(dict.fromkeys(names, 0.0), max).kinds
    more = f" and {len(kinds) - _SHOWN} more kinds" if len(kinds) > _SHOWN else ""
    return ", ".join(kinds[:_SHOWN]) + more
