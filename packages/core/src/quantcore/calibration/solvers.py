"""Solvers that one method offers to others: they choose codes on the scales that the other method's format has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from quantcore.calibration.block import Block


class SharedSolver(Protocol):
    """What the field `solver` of a `Backend` names.

    options: by layer of the block, keywords of the solver's own. The solver replaces every layer; scales and zero
    points are those that the layer's format chooses, which gives them by `solver_grid` and takes the codes back by
    `store_solved`; a layer whose `solved_family` is none of the solver's is rounded to nearest. A weight is solved as
    it is stored, under the transform of its format, for inputs under the same. Raises TypeError for options that it
    does not know, ValueError for values that cannot be.
    """

    def __call__(self, block: Block, options: Mapping[str, Mapping[str, Any]]) -> None: ...


def shared_solver(method: str) -> SharedSolver:
    """The solver that a method's backend offers to other methods.

    Raises ValueError when it offers none, and what `Plugins.backend` raises.
    """
    if not plugins().backend(method).solver:
        raise ValueError(f"{normalize_method(method)!r} offers no solver to other methods; leave it out")
    found: SharedSolver = plugins().resolve(method, "solver")
    return found
