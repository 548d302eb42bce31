"""Weights in rectangular blocks that share a scale: their ends, and what is done with the number of each.

A block is (rows, columns). A weight [N, K] has [ceil(N/rows), ceil(K/columns)] of them; the last ones may be short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantcore.formats.activation import abs_max
from quantcore.formats.row_chunks import row_chunks

Block = tuple[int, int]


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Number of blocks along N and K."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_abs_max(weight: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block of a weight [N, K], in its dtype; NaN where a block holds one."""
    largest = torch.empty(
        weight.shape[0], grid(tuple(weight.shape), block)[1], dtype=weight.dtype, device=weight.device
    )
    for rows in row_chunks(weight.shape):
        for groups, part in _column_groups(weight[rows], block[1]):
            largest[rows, groups] = abs_max(part)
    if block[0] == 1:
        return largest
    missing = -largest.shape[0] % block[0]
    padded = torch.nn.functional.pad(largest, (0, 0, 0, missing))
    return padded.view(-1, block[0], largest.shape[1]).amax(1)


def block_ends(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The least and the largest of each block of a weight [N, K] and 0, in its dtype."""
    across = grid(tuple(weight.shape), block)[1]
    low, high = weight.new_empty(weight.shape[0], across), weight.new_empty(weight.shape[0], across)
    for rows in row_chunks(weight.shape):
        for groups, part in _column_groups(weight[rows], block[1]):
            low[rows, groups], high[rows, groups] = torch.aminmax(part, dim=-1)
    padding = (0, 0, 0, -low.shape[0] % block[0])
    split = (torch.nn.functional.pad(end, padding).unflatten(0, (-1, block[0])) for end in (low, high))
    least, largest = split
    return least.amin(1).clamp_(max=0), largest.amax(1).clamp_(min=0)


def each_block_(
    operation: Callable[[Tensor, Tensor], Tensor], part: Tensor, table: Tensor, block: Block, rows: slice
) -> Tensor:
    """The given rows of a weight [r, K] after operation(values, number of their block), which works in place.

    table: [ceil(N/rows), ceil(K/columns)], a number for each block of the whole weight.
    """
    if table.shape[0] > 1 and block[0] > 1:
        table = table.index_select(0, torch.arange(rows.start, rows.stop, device=table.device) // block[0])
    elif table.shape[0] > 1:
        table = table[rows]
    for groups, values in _column_groups(part, block[1]):
        operation(values, table[:, groups, None])
    return part


def _column_groups(matrix: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views [r, groups, size] of a matrix [r, K], each with the numbers of its groups; a short last one by itself."""
    whole = matrix.shape[1] // size
    if whole:
        yield slice(0, whole), matrix[:, : whole * size].unflatten(1, (whole, size))
    if whole * size < matrix.shape[1]:
        yield slice(whole, whole + 1), matrix[:, whole * size :].unsqueeze(1)
