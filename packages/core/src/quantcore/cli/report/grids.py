"""Layers in a grid: how deep in the model they stand, and of which kind they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantcore.cli.report.text import shared_length

OUTSIDE = "–"  # the depth of a layer that is in no block


@dataclass(frozen=True)
class Grid:
    """A number for each kind of layer, in rows, at each depth, in columns; None where there is no such layer."""

    kinds: tuple[str, ...]
    depths: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]

    @property
    def numbers(self) -> list[float]:
        """Those that are there, finite."""
        return [cell for row in self.cells for cell in row if cell is not None and math.isfinite(cell)]


def grid(values: Mapping[str, float], join: Callable[[Sequence[float]], float]) -> Grid:
    """The grid of numbers of layers by their names. join: the number of several of one kind and depth: experts."""
    places: dict[tuple[str, str], list[float]] = {}
    for name, value in values.items():
        places.setdefault(_place(name), []).append(value)
    outside = dict.fromkeys(kind for kind, depth in places if depth == OUTSIDE)
    inside = dict.fromkeys(kind for kind, depth in places if depth != OUTSIDE)
    kinds = (*inside, *(kind for kind in outside if kind not in inside))
    depths = sorted(
        {depth for _, depth in places}, key=lambda depth: (depth == OUTSIDE, int(depth) if depth.isdigit() else 0)
    )
    cells = tuple(
        tuple(join(places[kind, depth]) if (kind, depth) in places else None for depth in depths) for kind in kinds
    )
    names = (*_without_prefix(list(inside)), *kinds[len(inside) :])
    return Grid(names, tuple(depths), cells)


def root_mean_square(values: Sequence[float]) -> float:
    """For relative errors of layers of like size."""
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _place(name: str) -> tuple[str, str]:
    """Kind and depth: the first number in a name is its depth, further ones are of experts and the like."""
    parts = name.split(".")
    position = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if position is None:
        return name, OUTSIDE
    rest = ["*" if part.isdecimal() else part for part in parts[position + 1 :]]
    return ".".join([*parts[:position], *rest]), str(int(parts[position]))


def _without_prefix(kinds: Sequence[str]) -> tuple[str, ...]:
    """Kinds without the words that all of them begin with."""
    if len(kinds) < 2:
        return tuple(kinds)
    words = [kind.split(".") for kind in kinds]
    shared = min(shared_length(words), min(map(len, words)) - 1)
    return tuple(".".join(parts[shared:]) for parts in words)
