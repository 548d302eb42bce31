"""Products of int8 matrices in exact integers, on the units that a device has for them."""

from __future__ import annotations

import torch
from torch import Tensor

_CUDA_ROWS = 32  # torch._int_mm on CUDA takes more than 16 rows, and N and K that are multiples of 8
_CUDA_MULTIPLE = 8


def int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T, int32 [M, N]. left: [M, K] int8; right: [N, K] int8, on the same device.

    Exact for K below 2**17, where no sum of products can leave int32.
    """
    (M, K), N = left.shape, right.shape[0]
    if not M or not N or not K:
        return left.new_zeros(M, N, dtype=torch.int32)
    if left.device.type == "cpu" and K > 1:  # torch 2.13 gives memory that it never wrote for one column
        return torch._int_mm(left, right.t())
    if left.device.type == "cuda":
        rows, columns = max(_CUDA_ROWS, _round_up(M)), _round_up(N)
        inner = _round_up(K)
        product = torch._int_mm(_pad(left, rows, inner), _pad(right, columns, inner).t())
        return product[:M, :N]
    return (left.double() @ right.t().double()).to(torch.int32)  # float64 holds every such sum exactly


def _round_up(size: int) -> int:
    return -(-size // _CUDA_MULTIPLE) * _CUDA_MULTIPLE


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below and to its right; itself where none are needed."""
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return torch.nn.functional.pad(matrix, missing) if any(missing) else matrix
