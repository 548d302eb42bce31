"""Data-parallel calibration: each process runs a share of the samples, statistics are those of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from quantcore.calibration.statistics import Reduction, Statistic

T = TypeVar("T")


class Team:
    """The processes of the default group of torch.distributed; this process alone where it is not initialized.

    Each process holds the whole model and must be given the same data, model and config.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process works on. Raises ValueError when some process would have none."""
        if len(items) < self.size:
            raise ValueError(
                f"calibration data gives {len(items)} forward passes for {self.size} processes; give more data, a "
                "smaller batch_size, or run fewer processes"
            )
        return list(items[self.rank :: self.size])

    def merge(self, statistic: Statistic) -> None:
        """Make a statistic that of all processes, in place."""
        if self.size > 1:
            statistic.reduce(_all_reduce)

    def agree(self, value: T) -> T:
        """The value of the first process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        agreed: T = box[0]
        return agreed

    def agrees(self, value: object) -> bool:
        """Whether all processes hold the same value; each learns it."""
        if self.size == 1:
            return True
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return all(other == value for other in values)


def _all_reduce(tensor: Tensor, how: Reduction) -> None:
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(tensor, operations[how])
