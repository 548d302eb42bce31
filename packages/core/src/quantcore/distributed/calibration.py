"""Work that the processes of a calibration share: samples, and the layers of a block.

Each process runs a share of the samples; statistics are those of all. What is solved from them is shared out, and each
process gets all of the results. Every value depends on the data alone, not on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from quantcore.distributed.processes import join_processes, waiting
from quantcore.errors import ProcessGroupError

T = TypeVar("T")
Reduction = Literal["sum", "max", "min"]


class Reducible(Protocol):
    """What is summed up from the data of all processes, such as a statistic."""

    def reduce(self, reduce: Callable[[Tensor, Reduction], None]) -> None:
        """Call reduce on each tensor, which it changes in place."""


class CalibrationGroup:
    """The processes of the default group of torch.distributed; this process alone where there is none.

    The group is initialized where torchrun started several processes and nobody did. Each process holds the whole
    model, or reads it from the same files, and must be given the same data, model and config.
    """

    def __init__(self) -> None:
        join_processes()
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and tells for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process works on. Raises ValueError when some process would have none."""
        if len(items) < self.size:
            raise ValueError(
                f"calibration data gives {len(items)} forward passes for {self.size} processes; give more data, a "
                "smaller batch_size, or run fewer processes"
            )
        return list(items[self.rank :: self.size])

    def merge(self, statistic: Reducible) -> None:
        """Make a statistic that of all processes, in place."""
        if self.size > 1:
            with waiting():
                statistic.reduce(_all_reduce)

    def agree(self, value: T) -> T:
        """The value of the first process."""
        return value if self.size == 1 else self._sent(value, 0)

    def agrees(self, value: object) -> bool:
        """Whether all processes hold the same value; each learns it."""
        if self.size == 1:
            return True
        values: list[object] = [None] * self.size
        with waiting():
            dist.all_gather_object(values, value)
        return all(other == value for other in values)

    def first(self, compute: Callable[[], T]) -> T:
        """What the first process computes. Raises ProcessGroupError in the others when it fails."""
        return self.spread([1], lambda number: compute())[0]

    def spread(self, costs: Sequence[float], compute: Callable[[int], T]) -> list[T]:
        """What compute gives for 0, 1, ... len(costs) - 1; each is computed by one process and sent to all.

        costs: how long each takes, in any unit. What is sent must be on the CPU. An error is raised as it is in the
        process where it occurred, and as ProcessGroupError in the others.
        """
        if self.size == 1:
            return [compute(number) for number in range(len(costs))]
        owners = self.owners(costs)
        own = [number for number, owner in enumerate(owners) if owner == self.rank]
        results: dict[int, Any] = {}
        try:
            for number in own:
                results[number] = compute(number)
        except Exception as error:
            text = f"process {self.rank} of {self.size} ended: {error or type(error).__name__}"
            self._exchanged(owners, {}, text)
            raise
        return self._exchanged(owners, results, None)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The process that computes each item: the dearest first, to the one with the least to do."""
        load, owners = [0.0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
            owners[number] = min(range(self.size), key=lambda rank: load[rank])
            load[owners[number]] += costs[number]
        return owners

    def _exchanged(self, owners: Sequence[int], results: dict[int, Any], failure: str | None) -> list[Any]:
        failures: list[str | None] = [None] * self.size
        with waiting():
            dist.all_gather_object(failures, failure)
        told = next((text for text in failures if text is not None), None)
        if told is not None:
            if failure is None:
                raise ProcessGroupError(told)
            return []
        return [self._sent(results.get(number), owner) for number, owner in enumerate(owners)]

    def _sent(self, value: T | None, source: int) -> T:
        box: list[Any] = [value if self.rank == source else None]
        with waiting():
            dist.broadcast_object_list(box, src=source)
        sent: T = box[0]
        return sent


class ThisProcess(CalibrationGroup):
    """A group of this process alone, whatever others there are."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1


def _all_reduce(tensor: Tensor, how: Reduction) -> None:
    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(tensor, operations[how])
