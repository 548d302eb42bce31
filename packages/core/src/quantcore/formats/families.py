"""The canonical numeric forms that formats lower to, so that kernels and conversions are written once a family."""

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

    def _spread(self, factors: Tensor) -> Tensor:
        return factors.view(-1, self.groups).index_select(1, self.index)


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
    return ColumnGroups(_runs(columns, size, device), groups) if columns % size else Grouping(size)


def _runs(columns: int, size: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(columns, dtype=torch.int32, device=device) // size


@dataclass(frozen=True)
class Affine:
    """w = (code - zero) * scale, computed in the dtype of scale.

    codes: [N, K] uint8. scale, zero: [G] float, in the order of grouping; zero in code units, perhaps fractional.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grouping: Grouping | ColumnGroups
    bits: float

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the dtype of scale)."""
        values = self.grouping.shift(self.codes.reshape(-1).to(self.scale.dtype), self.zero)
        return self.grouping.scale(values, self.scale).view(self.codes.shape).to(dtype or self.scale.dtype)

    def by_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """scale and zero [N, G], and the group of each column [K] int32.

        Raises ValueError where a group is not a set of whole columns within a row, or some whole rows.
        """
        rows, columns = self.codes.shape
        grouping, device = self.grouping, self.codes.device
        if isinstance(grouping, ColumnGroups):
            return self.scale.view(rows, -1), self.zero.view(rows, -1), grouping.index
        if not grouping.strided and columns % grouping.size == 0:
            return self.scale.view(rows, -1), self.zero.view(rows, -1), _runs(columns, grouping.size, device)
        if not grouping.strided and grouping.size % columns == 0:
            row = torch.arange(rows, device=device) // (grouping.size // columns)
            return self.scale[row, None], self.zero[row, None], _runs(columns, columns, device)
        raise ValueError(f"{grouping} of a weight {[rows, columns]} does not group columns within a row")

    def by_column_runs(self, size: int) -> tuple[Tensor, Tensor]:
        """scale and zero [N, ceil(K / size)] of runs of `size` columns. Raises ValueError where a run mixes groups."""
        scale, zero, index = self.by_columns()
        first = index[::size]
        if not torch.equal(first.repeat_interleave(size)[: index.numel()], index):
            raise ValueError(f"columns of one run of {size} belong to different groups: {self.grouping}")
        return scale.index_select(1, first), zero.index_select(1, first)


@dataclass(frozen=True)
class NestedScale:
    """Block scales that are themselves stored as 8-bit codes: scale = levels[code] * outer[group] + offset.

    codes: [G] uint8. levels: [256] float32. outer: [ceil(G / grouping.size)] float32. offset: float32 scalar.
    """

    codes: Tensor
    levels: Tensor
    outer: Tensor
    grouping: Grouping
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The block scales [G] float32, two roundings."""
        return self.grouping.scale(self.levels[self.codes.int()], self.outer) + self.offset


@dataclass(frozen=True)
class Lookup:
    """w = levels[code] * scale, computed in float32.

    codes: [N, K] uint8. levels: [L] float32. scale: [G] float32, or the nested form of it.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor | NestedScale
    grouping: Grouping
    bits: float

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: float32), rounded once from float32."""
        scale = self.scale.dequantize() if isinstance(self.scale, NestedScale) else self.scale
        values = self.grouping.scale(self.levels[self.codes.reshape(-1).int()], scale)
        return values.view(self.codes.shape).to(dtype or torch.float32)


Family: TypeAlias = Affine | Lookup
