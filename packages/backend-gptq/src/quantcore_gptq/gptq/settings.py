"""What the solver of one weight is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How one weight is solved.

    group_size: columns of a group. mse: power of the error that the search for scales minimizes, 0 for none. weighted:
    that search counts each column by what its error costs in the output once the columns after it have made up for it.
    damp: added to the diagonal of the Hessian, in units of its mean; raised by damp_step until the inverse exists.
    zero_range: least and greatest zero point. element: the small float, by name, that codes are of, whose grid is given
    to the solver; None for integers of bits.
    """

    bits: int
    group_size: int
    sym: bool = True
    desc_act: bool = False
    group_aware: bool = False
    static_groups: bool = False
    mse: float = 0.0
    weighted: bool = False
    damp: float = 0.1
    damp_step: float = 0.01
    zero_range: tuple[int, int] = (0, 255)
    element: str | None = None
