"""What a long calibration tells while it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A layer was finished. block: number of its block, from 1; weights: finished so far, of all `of_weights`."""

    block: int
    blocks: int
    block_name: str
    layer: str
    loss: float | None
    weights: int
    of_weights: int
