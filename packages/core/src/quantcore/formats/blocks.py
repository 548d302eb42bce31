"""Weights in rectangular blocks that share a scale: largest magnitudes, codes and values, a few rows at a time.

A block is (rows, columns). A weight [N, K] has [ceil(N/rows), ceil(K/columns)] of them; the last ones may be short.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantcore.formats.activation import abs_max
from quantcore.formats.minifloat import MiniFloat, decode, encode
from quantcore.formats.pieces import row_pieces

Block = tuple[int, int]


def grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Number of blocks along N and K."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def block_abs_max(weight: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block of a weight [N, K], in its dtype; NaN where a block holds one."""
    largest = torch.empty(
        weight.shape[0], grid(tuple(weight.shape), block)[1], dtype=weight.dtype, device=weight.device
    )
    for rows in row_pieces(weight.shape):
        for groups, part in _column_groups(weight[rows], block[1]):
            largest[rows, groups] = abs_max(part)
    if block[0] == 1:
        return largest
    missing = -largest.shape[0] % block[0]
    padded = torch.nn.functional.pad(largest, (0, 0, 0, missing))
    return padded.view(-1, block[0], largest.shape[1]).amax(1)


def quantize_blocks(
    weight: Tensor, factor: Tensor, block: Block, element: MiniFloat, *, divide: bool = False, ties: str = "even"
) -> Tensor:
    """Codes [N, K] of weight * factor, or of weight / factor, in float32. factor: float32, one for each block.

    ties: as in `encode`.
    """
    codes = torch.empty(weight.shape, dtype=element.dtype or torch.uint8, device=weight.device)
    for rows in row_pieces(weight.shape):
        part = weight[rows].to(torch.float32, copy=True)
        codes[rows] = encode(scale_rows_(part, factor, block, rows, divide=divide), element, ties)
    return codes


def dequantize_blocks(codes: Tensor, scale: Tensor, block: Block, element: MiniFloat, dtype: torch.dtype) -> Tensor:
    """The weight [N, K]: code * scale in float32, rounded once to dtype. scale: float32, one for each block."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_pieces(codes.shape):
        weight[rows] = scale_rows_(decode(codes[rows], element), scale, block, rows)
    return weight


def scale_rows_(part: Tensor, factor: Tensor, block: Block, rows: slice, *, divide: bool = False) -> Tensor:
    """The given rows of a weight, float32 [r, K], times or divided by their blocks' factors, in place."""
    if block[0] > 1:
        index = torch.arange(rows.start, rows.stop, device=factor.device) // block[0]
        factor = factor.index_select(0, index)
    else:
        factor = factor[rows]
    for groups, values in _column_groups(part, block[1]):
        (values.div_ if divide else values.mul_)(factor[:, groups, None])
    return part


def _column_groups(matrix: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Views [r, groups, size] of a matrix [r, K], each with the numbers of its groups; a short last one by itself."""
    whole = matrix.shape[1] // size
    if whole:
        yield slice(0, whole), matrix[:, : whole * size].unflatten(1, (whole, size))
    if whole * size < matrix.shape[1]:
        yield slice(whole, whole + 1), matrix[:, whole * size :].unsqueeze(1)
