"""Which scale each weight uses: ways to cut a weight into groups that share one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Which scale each weight uses, by its index i in the flattened row-major weight.

    Contiguous: group i // size, the last group may be short. Strided: group i % count, where count = numel / size.
    """

    size: int
    strided: bool = False

    def __str__(self) -> str:
        return f"groups of {self.size}{' strided' if self.strided else ''} weights"

    def count(self, numel: int) -> int:
        """Number of groups of a weight with numel elements."""
        return numel // self.size if self.strided else -(-numel // self.size)

    def scale(self, values: Tensor, factors: Tensor) -> Tensor:
        """values [numel] times each element's factor [G]; one rounding in values' dtype."""
        if self.strided:
            return (values.view(self.size, -1) * factors).view(-1)
        whole = values.numel() // self.size * self.size
        head = values[:whole].view(-1, self.size) * factors[: whole // self.size, None]
        return torch.cat([head.view(-1), values[whole:] * factors[whole // self.size :]])

    def shift(self, values: Tensor, offsets: Tensor) -> Tensor:
        """values [numel] minus each element's offset [G]; one rounding in values' dtype."""
        if self.strided:
            return (values.view(self.size, -1) - offsets).view(-1)
        whole = values.numel() // self.size * self.size
        head = values[:whole].view(-1, self.size) - offsets[: whole // self.size, None]
        return torch.cat([head.view(-1), values[whole:] - offsets[whole // self.size :]])

    def by_columns(self, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """As `ColumnGroups.by_columns`. Raises ValueError where a group is neither whole rows nor a part of one row."""
        rows, columns = shape
        if not self.strided and columns % self.size == 0:
            return _in_order(rows, columns // self.size, device), runs(columns, self.size, device)
        if not self.strided and self.size % columns == 0:
            row = torch.arange(rows, device=device) // (self.size // columns)
            return row[:, None], runs(columns, columns, device)
        if self.strided and self.size % rows == 0 and self.count(rows * columns) == columns:
            index = torch.arange(columns, dtype=torch.int32, device=device)
            return index.long().expand(rows, columns), index
        raise ValueError(f"{self} of a weight {[rows, columns]} does not group columns within a row")


@dataclass(frozen=True, eq=False)
class ColumnGroups:
    """Which scale each weight uses where a group is a set of columns: row n, column k uses n * groups + index[k].

    index: [K] int32, each in [0, groups). For groups in any order of columns, and runs of which the last is short.
    """

    index: Tensor
    groups: int

    def __str__(self) -> str:
        return f"{self.groups} groups of columns in an order of their own"

    def count(self, numel: int) -> int:
        """Number of groups of a weight with numel elements."""
        return numel // self.index.numel() * self.groups

    def scale(self, values: Tensor, factors: Tensor) -> Tensor:
        """values [numel] times each element's factor [N * groups]; one rounding in values' dtype."""
        return (values.view(-1, self.index.numel()) * self._spread(factors)).view(-1)

    def shift(self, values: Tensor, offsets: Tensor) -> Tensor:
        """values [numel] minus each element's offset [N * groups]; one rounding in values' dtype."""
        return (values.view(-1, self.index.numel()) - self._spread(offsets)).view(-1)

    def by_columns(self, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Which factor each row uses for each of its groups [N, G] int64, and the group of each column [K] int32."""
        return _in_order(shape[0], self.groups, device), self.index

    def _spread(self, factors: Tensor) -> Tensor:
        return factors.view(-1, self.groups).index_select(1, self.index)


@dataclass(frozen=True)
class BlockGroups:
    """Which scale each weight uses where a group is a block of rows and columns of a weight [N, width].

    Row n, column k uses (n // rows) * ceil(width / columns) + k // columns; the last blocks may be short.
    """

    rows: int
    columns: int
    width: int

    def __str__(self) -> str:
        return f"blocks of {self.rows} rows by {self.columns} columns"

    def count(self, numel: int) -> int:
        """Number of groups of a weight with numel elements."""
        return -(-numel // self.width // self.rows) * -(-self.width // self.columns)

    def scale(self, values: Tensor, factors: Tensor) -> Tensor:
        """values [numel] times each element's factor [G]; one rounding in values' dtype."""
        return (values.view(-1, self.width) * self._spread(factors, values.numel())).view(-1)

    def shift(self, values: Tensor, offsets: Tensor) -> Tensor:
        """values [numel] minus each element's offset [G]; one rounding in values' dtype."""
        return (values.view(-1, self.width) - self._spread(offsets, values.numel())).view(-1)

    def by_columns(self, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """As `ColumnGroups.by_columns`."""
        across = -(-self.width // self.columns)
        row = torch.arange(shape[0], device=device) // self.rows * across
        return row[:, None] + torch.arange(across, device=device), runs(self.width, self.columns, device)

    def _spread(self, factors: Tensor, numel: int) -> Tensor:
        place, index = self.by_columns((numel // self.width, self.width), factors.device)
        return factors[place].index_select(1, index)


Groups: TypeAlias = Grouping | ColumnGroups | BlockGroups


def column_grouping(
    columns: int, size: int, index: Tensor | None = None, device: torch.device | None = None
) -> Grouping | ColumnGroups:
    """The grouping of weights with this many columns in groups of `size` columns, each row by itself.

    index: [K] int32, the group of each column; None means runs. device: of the index where one is made. The plainest
    form that says it: formats that hold the same numbers lower to the same grouping.
    """
    groups = -(-columns // size)
    if index is not None:
        return ColumnGroups(index, groups)
    return ColumnGroups(runs(columns, size, device), groups) if columns % size else Grouping(size)


def runs(columns: int, size: int, device: torch.device | None = None) -> Tensor:
    """The group of each column [K] int32 in runs of `size` columns."""
    return torch.arange(columns, dtype=torch.int32, device=device) // size


def _in_order(rows: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(rows * groups, device=device).view(rows, groups)
