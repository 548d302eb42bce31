"""Products of int8 matrices in exact integers, on the units that a device has for them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.kernels import verification
from quantcore.kernels.kernel import Problem
from quantcore.kernels.triton.kernels import DTYPES

_CUDA_ROWS = 17  # the fewest that torch._int_mm takes on CUDA
_CUDA_MULTIPLE = 8  # of N and K there
_LONGEST_SUM = 1 << 17  # columns whose products an int32 holds


class Scaled(NamedTuple):
    """How exact sums become floats: sum * (rows[m] * columns[n]) * factor + bias[n] in float32, rounded to dtype.

    rows: [M]; columns and bias: [N]; each operation rounds, from left to right.
    """

    rows: Tensor
    columns: Tensor
    dtype: torch.dtype
    bias: Tensor | None = None
    factor: float = 1.0

    def __call__(self, sums: Tensor) -> Tensor:
        """The floats of sums [M, N]."""
        y = sums.float().mul_(self.rows.float()[:, None] * self.columns.float()).mul_(self.factor)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)


def refuse_int8(problem: Problem, rounding: Activation | None, device: str = "cuda") -> str | None:
    """Why `int8_product` cannot serve a problem on a type of device whose input is rounded so, or None."""
    if rounding is None or rounding.integer_bits is None or rounding.strategy == "group" or rounding.outer is not None:
        return "serves inputs that are rounded to integers, with one scale for each token, or one for all"
    if not rounding.is_symmetric:
        return "serves inputs without zero points"
    if problem.device != device:
        return f"runs on {device}, not on {problem.device}"
    if problem.dtype not in DTYPES or problem.K >= _LONGEST_SUM:
        return f"serves float32, bfloat16 and float16, and less than {_LONGEST_SUM} columns"
    return None


def int8_product(left: QuantizedInput, right: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product of an input [M, K] and a weight [N, K], both int8 codes under scales, plus bias: for x [..., K].

    The scale of each is one number, or one for each row, of any float dtype and shape. Returns [..., N] in x's dtype,
    rounded once.
    """
    M, N = left.codes.shape[0], right.shape[0]
    scaled = Scaled(left.scale.reshape(-1).expand(M), scale.reshape(-1).expand(N), x.dtype, bias)
    return int8_matmul(left.codes, right, scaled).view(*x.shape[:-1], N)


def int8_matmul(left: Tensor, right: Tensor, scaled: Scaled | None = None) -> Tensor:
    """left @ right.T, int32 [M, N], or what scaled makes of it. left: [M, K] int8; right: [N, K] int8, one device.

    Exact for K below _LONGEST_SUM, where no sum of products can leave int32.
    """
    (M, K), N = left.shape, right.shape[0]
    if left.device.type != "cuda" or _torch_takes(M, N, K) or not verification.may_use_triton(left.device):
        return _in_torch(left, right, scaled)
    from quantcore.kernels.triton import int8_gemm as kernel

    kind = ((M - 1).bit_length(), N, K, None if scaled is None else scaled.dtype)
    fast, slow = (partial(function, left, right, scaled) for function in (kernel.int8_matmul, _in_torch))
    return verification.run("int8_matmul", kind, left.device, fast, slow)


def _torch_takes(M: int, N: int, K: int) -> bool:
    """Whether torch._int_mm takes these sizes on CUDA, or none is needed."""
    return (M >= _CUDA_ROWS and N % _CUDA_MULTIPLE == K % _CUDA_MULTIPLE == 0) or 0 in (M, N, K)


def _in_torch(left: Tensor, right: Tensor, scaled: Scaled | None) -> Tensor:
    sums = _int8_sums(left, right)
    return sums if scaled is None else scaled(sums)


def _int8_sums(left: Tensor, right: Tensor) -> Tensor:
    (M, K), N = left.shape, right.shape[0]
    if not M or not N or not K:
        return left.new_zeros(M, N, dtype=torch.int32)
    if left.device.type == "cpu" and K > 1:  # torch 2.13 gives memory that it never wrote for one column
        return torch._int_mm(left, right.t())
    if left.device.type == "cuda":
        rows, columns, inner = max(_CUDA_ROWS, M), _round_up(N), _round_up(K)
        product = torch._int_mm(_pad(left, rows, inner), _pad(right, columns, inner).t())
        return product[:M, :N]
    return (left.double() @ right.t().double()).to(torch.int32)  # float64 holds every such sum exactly


def _round_up(size: int) -> int:
    return -(-size // _CUDA_MULTIPLE) * _CUDA_MULTIPLE


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below and to its right, row-major as cuBLAS asks; itself where it is all that."""
    missing = (0, columns - matrix.shape[1], 0, rows - matrix.shape[0])
    return (torch.nn.functional.pad(matrix, missing) if any(missing) else matrix).contiguous()
