# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
"""The product of E4M3 inputs and E4M3 weights in blocks, as one Triton kernel.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2: tensor cores of Hopper keep about 14 bits of a sum of 8-bit
floats, so the sum over each group of columns is promoted to float32 registers, where both scales are applied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.sdk import INTERPRETED, QuantizedInput, blocks, e4m3_values, on_device, rounded

BM, BN = 64, 64
FEW_ROWS = 16  # the fewest rows that a tensor core takes


@triton.jit
def block_matmul_kernel(
    x,
    x_scale,
    weight,
    scale,
    y,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y [M, N]; x [M, K] and weight [N, K] are bytes of E4M3, x_scale [M, K/G] and scale [N/ROWS, K/G] float32."""
    blocks_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // blocks_m) * BN + tl.arange(0, BN)
    groups = tl.cdiv(K, G)
    sums = tl.zeros((BM, BN), tl.float32)
    for group in range(groups):
        k = group * G + tl.arange(0, G)
        a = load_bytes(x, m, k, M, K)
        b = load_bytes(weight, n, k, N, K)
        part = tl.dot(a, tl.trans(b), input_precision="ieee")
        of_x = tl.load(x_scale + m * groups + group, mask=m < M, other=0.0)
        of_weight = tl.load(scale + n // ROWS * groups + group, mask=n < N, other=0.0)
        sums += part * of_x[:, None] * of_weight[None, :]
    result = rounded(sums, y.dtype.element_ty)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def load_bytes(codes, rows, columns, R, K):
    """[rows, columns] of bytes as E4M3, zero outside; as float32 in the interpreter, which has no such product."""
    mask = (rows < R)[:, None] & (columns < K)[None, :]
    loaded = tl.load(codes + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=mask, other=0)
    if INTERPRETED:
        return e4m3_values(loaded)
    return loaded.to(tl.float8e4nv, bitcast=True)


def block_matmul(x: QuantizedInput, weight: Tensor, scale: Tensor, block: blocks.Block, dtype: torch.dtype) -> Tensor:
    """x [M, K] times weight [N, K], in dtype: float32, bfloat16 or float16.

    scale: float32, one for each block of the weight; x has scales for groups of as many columns.
    """
    (M, K), N = x.codes.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=dtype, device=weight.device)
    if y.numel() == 0:
        return y
    rows, group = block
    bm = FEW_ROWS if M <= FEW_ROWS else BM
    grid = (triton.cdiv(M, bm) * triton.cdiv(N, BN),)
    tensors = (x.codes.view(torch.uint8).contiguous(), x.scale.contiguous(), weight.view(torch.uint8).contiguous())
    with on_device(y.device):
        block_matmul_kernel[grid](
            *tensors, scale.contiguous(), y, M, N, K, ROWS=rows, G=group, BM=bm, BN=BN, num_warps=4, num_stages=3
        )
    return y
