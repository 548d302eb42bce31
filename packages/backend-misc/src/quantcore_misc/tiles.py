"""Scales in tiles of 128 rows and 4 columns, as the tensor cores of NVIDIA's Blackwell read them, one after the other.

In a tile rows 0, 32, 64 and 96 lie side by side, 4 columns of each, then rows 1, 33, 65 and 97, and so on.
Source: NVIDIA, cuBLAS documentation, "1D block scaling factors layout".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS, COLUMNS = 128, 4  # of a tile
_STRIPES = 4  # rows of a tile that lie side by side


def padded(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of whole tiles that hold so many."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


def tile(scale: Tensor) -> Tensor:
    """Scales [R, C] of one byte each in tiles, uint8 [R' * C'], filled up with zeros."""
    tiles = pad(scale).view(-1, _STRIPES, ROWS // _STRIPES, padded(*scale.shape)[1] // COLUMNS, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def untile(stored: Tensor, rows: int, columns: int) -> Tensor:
    """The bytes of scales, uint8 [R, C]; the inverse of `tile`."""
    across = padded(rows, columns)[1] // COLUMNS
    tiles = stored.view(torch.uint8).view(-1, across, ROWS // _STRIPES, _STRIPES, COLUMNS)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(-1, across * COLUMNS)
    return whole[:rows, :columns].contiguous()


def pad(scale: Tensor) -> Tensor:
    """Scales [R, C] of one byte each as bytes [R', C'], filled up with zeros."""
    rows, columns = padded(*scale.shape)
    raw = scale.contiguous().view(torch.uint8)
    return functional.pad(raw, (0, columns - raw.shape[1], 0, rows - raw.shape[0]))


def unpad(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Bytes [R, C]; the inverse of `pad`, for what has any shape."""
    whole = stored.view(torch.uint8).view(padded(rows, columns))
    return whole[:rows, :columns].contiguous()
