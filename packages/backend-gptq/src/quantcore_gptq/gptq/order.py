"""The order in which the columns of a weight are rounded: large inputs first, while there is most to make up with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantcore_gptq.gptq.settings import Settings


@dataclass(frozen=True)
class Order:
    """permutation: [K], the column that is rounded at each place; None for the usual order. size: columns of a group.

    regroups: whether groups are runs of the new order, so that columns of one group lie apart in the weight.
    """

    permutation: Tensor | None
    columns: int
    size: int
    regroups: bool

    def apply(self, matrix: Tensor) -> Tensor:
        """A matrix [K, K] in this order."""
        return matrix if self.permutation is None else matrix[self.permutation][:, self.permutation]

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor [K, ...] in this order."""
        return tensor if self.permutation is None else tensor[self.permutation]

    def back(self, tensor: Tensor) -> Tensor:
        """A tensor [K, ...] of this order in the usual one."""
        return tensor if self.permutation is None else tensor[self._inverse]

    @property
    def index(self) -> Tensor | None:
        """The group of each column of the weight, int32 [K]; None for runs."""
        if not self.regroups or self.permutation is None:
            return None
        return (self._inverse // self.size).to(torch.int32)

    @cached_property
    def runs(self) -> list[int]:
        """The group of each place, where groups are runs of this order."""
        return [place // self.size for place in range(self.columns)]

    @cached_property
    def groups(self) -> list[int]:
        """The group of each place, where groups are runs of the usual order."""
        return self.runs if self.permutation is None else (self.permutation // self.size).tolist()

    @property
    def group_places(self) -> Tensor | slice:
        """Where the run of this order stands that holds the columns of each group of the weight."""
        if self.regroups or self.permutation is None:
            return slice(None)
        return (self.permutation[:: self.size] // self.size).argsort()

    @property
    def _inverse(self) -> Tensor:
        assert self.permutation is not None
        return self.permutation.argsort()


def order_of(diagonal: Tensor, settings: Settings) -> Order:
    """The order for inputs with this diagonal of the Hessian [K]."""
    size, columns = settings.group_size, len(diagonal)
    if settings.desc_act:
        order = diagonal.argsort(descending=True)
        return Order(order, columns, size, regroups=not settings.static_groups)
    permutation = _group_aware(diagonal, size) if settings.group_aware else None
    return Order(permutation, columns, size, regroups=False)


def _group_aware(diagonal: Tensor, size: int) -> Tensor:
    """Columns sorted within each group, and whole groups by their largest; a short group stays at the end."""
    whole = len(diagonal) // size
    cut = whole * size
    within = diagonal[:cut].view(whole, size).argsort(1, descending=True)
    within += torch.arange(whole, device=diagonal.device)[:, None] * size
    first = diagonal[:cut].view(whole, size).amax(1).argsort(descending=True)
    tail = torch.arange(cut, len(diagonal), device=diagonal.device)
    return torch.cat([within[first].flatten(), tail])
