"""The small table that says how large the parts of a model are."""

from __future__ import annotations

from collections.abc import Sequence

from quantcore.cli.output import in_bytes, table


def size_table(rows: Sequence[tuple[str, int | None, int]]) -> str:
    """A row for each part: its name, number of weights if known, and bytes; the bits per weight follow."""
    columns = ("", "weights", "bits/weight", "size")
    cells = [
        (
            name,
            "unknown" if weights is None else f"{weights:,}",
            bits(8 * size / weights if weights else None),
            in_bytes(size),
        )
        for name, weights, size in rows
    ]
    return table(columns, cells, right=columns[1:])


def bits(value: float | None) -> str:
    """Bits per weight as tables show them."""
    return "-" if value is None else f"{value:.3f}"
