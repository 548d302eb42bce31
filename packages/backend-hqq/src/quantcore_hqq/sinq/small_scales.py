"""Scales and zeros of groups in 8 bits: a code each, and float16 scale and offset for each column of codes.

Source: sinq 0.2.0, `quantAux`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_ROWS = 32  # scales that share a range
_TOP = 255


def shrink(values: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, C] uint8, scale and offset [1, C] float16 of values of rows * C numbers, every step in float16.

    Numbers of a column that are all the same have scale 0 and code 0.
    """
    columns = values.to(torch.float16).reshape(rows, -1)
    offset = columns.amin(0, keepdim=True)
    scale = (columns.amax(0, keepdim=True) - offset) / _TOP
    codes = ((columns - offset) / scale).round_().nan_to_num_(nan=0, posinf=0).clamp_(0, _TOP)
    return codes.to(torch.uint8), scale, offset


def grow(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The values of codes [rows, C], flat: a rounding to float16 for the product, and one for the sum."""
    return (codes * scale + offset).view(-1)
