# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
"""The product of int8 matrices on a GPU's integer tensor cores, for every shape, with scales applied to the sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.kernels.int8_product import Scaled
from quantcore.kernels.triton.heuristics import GEMV_ROWS, Launch
from quantcore.kernels.triton.launch import on_device
from quantcore.kernels.triton.rounding import rounded

# Few rows are bound by reading `right`: narrow tiles give every multiprocessor a program, long ones whole cache lines.
_FEW_ROWS = Launch(GEMV_ROWS, 32, 256, num_stages=4)
_SOME_ROWS = Launch(64, 64, 128, num_stages=3)
_MANY_ROWS = Launch(128, 128, 128, num_warps=8, num_stages=3)


@triton.jit
def int8_matmul_kernel(
    left,
    right,
    rows,
    columns,
    bias,
    y,
    M,
    N,
    K,
    factor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [M, N]: left [M, K] times right [N, K], int32, or with rows [M] and columns [N] what `Scaled` makes of it."""
    blocks_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // blocks_m) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a, b = load_tile(left, m, k, M, K), load_tile(right, n, k, N, K)
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if rows is None:
        tl.store(y + place, sums, mask=mask)
    else:
        of_row = tl.load(rows + m, mask=m < M, other=0.0)
        of_column = tl.load(columns + n, mask=n < N, other=0.0)
        values = sums.to(tl.float32) * (of_row[:, None] * of_column[None, :]) * factor
        if bias is not None:
            values += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
        tl.store(y + place, rounded(values, y.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(matrix, rows, k, R, K):
    """[rows, k] of a matrix [R, K], zero outside."""
    mask = (rows < R)[:, None] & (k < K)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0)


def int8_matmul(left: Tensor, right: Tensor, scaled: Scaled | None = None) -> Tensor:
    """As `quantcore.kernels.int8_product.int8_matmul`, for matrices that are not empty."""
    (M, K), N = left.shape, right.shape[0]
    y = left.new_empty(M, N, dtype=torch.int32 if scaled is None else scaled.dtype)
    launch = _FEW_ROWS if M <= GEMV_ROWS else _SOME_ROWS if M <= 4 * GEMV_ROWS else _MANY_ROWS
    options = {name: value for name, value in launch._asdict().items() if name != "SPLITS"}
    grid = (triton.cdiv(M, launch.BM) * triton.cdiv(N, launch.BN),)
    factor = 1.0 if scaled is None else float(scaled.factor)
    arguments = (left.contiguous(), right.contiguous(), *_floats(scaled), y, M, N, K, factor)
    with on_device(y.device):
        int8_matmul_kernel[grid](*arguments, **options, enable_fp_fusion=False)
    return y


def _floats(scaled: Scaled | None) -> tuple[Tensor | None, ...]:
    """Scales of rows and columns and the bias, float32 and contiguous."""
    if scaled is None:
        return None, None, None
    tensors = (scaled.rows, scaled.columns, scaled.bias)
    return tuple(None if tensor is None else tensor.float().contiguous() for tensor in tensors)
