"""Where the rows and columns of a weight lie in its packed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16
COLUMNS = 32
_PARTS = (4, 8, 16)  # columns of a group that may share a unit with others


@dataclass(frozen=True)
class Columns:
    """The order of packed columns, and the groups that they form.

    order: [padded] int32, the column that each packed one holds, -1 for none; None where they are as they were.
    """

    padded: int
    group: int
    order: Tensor | None = None

    @property
    def groups(self) -> int:
        return -(-self.padded // self.group)


def group_columns(index: Tensor, groups: int) -> Columns:
    """The layout of columns whose groups index [K] numbers, from 0 to groups - 1: those of a group stand together."""
    columns = index.numel()
    if groups == 1:
        padded = _up(columns, COLUMNS)
        return Columns(padded, padded)
    counts = torch.bincount(index, minlength=groups)
    largest = int(counts.max())
    size = next((part for part in _PARTS if part >= largest), _up(largest, COLUMNS))
    if size == largest and torch.equal(index.int(), torch.arange(columns, dtype=torch.int32) // size):
        return Columns(_up(columns, COLUMNS), size)
    return Columns(_up(groups * size, COLUMNS), size, _order(index, counts, size))


def _order(index: Tensor, counts: Tensor, size: int) -> Tensor:
    """Columns sorted by group, each group filled up to size."""
    order = torch.full((_up(counts.numel() * size, COLUMNS),), -1, dtype=torch.int32)
    columns = torch.argsort(index, stable=True)
    within = torch.arange(index.numel()) - (counts.cumsum(0) - counts)[index[columns].long()]
    order[index[columns].long() * size + within] = columns.int()
    return order


@dataclass(frozen=True)
class Rows:
    """The order of packed rows. row_of: [blocks * 16] int32, -1 for none. class_of: [blocks] int32."""

    blocks: int
    row_of: Tensor | None = None
    class_of: Tensor | None = None


def plain_rows(rows: int) -> Rows:
    """Rows as they are."""
    return Rows(-(-rows // ROWS))


def rows_by_residue(rows: int, classes: int) -> Rows:
    """Rows whose numbers leave the same remainder when divided by classes stand in blocks of their own."""
    if classes == 1:
        return plain_rows(rows)
    blocks = -(-rows // classes // ROWS)  # of a class
    numbers = torch.full((classes, blocks * ROWS), -1, dtype=torch.int32)
    numbers[:, : rows // classes] = torch.arange(rows, dtype=torch.int32).view(-1, classes).t()
    return Rows(classes * blocks, numbers.view(-1), torch.arange(classes, dtype=torch.int32).repeat_interleave(blocks))


def by_blocks(factors: Tensor, groups: int) -> Tensor:
    """Factors [N, G] as [blocks, groups, 16], zeros for rows and groups that do not exist.

    groups: those of the packed columns, of which padding may make one more than the weight has.
    """
    rows, known = factors.shape
    padded = torch.nn.functional.pad(factors, (0, groups - known, 0, _up(rows, ROWS) - rows))
    return padded.view(-1, ROWS, groups).transpose(1, 2).contiguous()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
