# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The skeletons of the contract `tile`: words are loaded whole, each once, and the decoder turns them into values.

For weights of two 4-bit codes a byte, in groups of D.group along K, which divides K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantcore.kernels.triton.rounding import rounded
from quantcore.kernels.triton.skeletons import store_result


@triton.jit
def group_sums(tensors, codes, group, inside, x, D: tl.constexpr, COMPUTE: tl.constexpr):
    """float32 [BN, BG, W]: codes as values times x, zero where a group is not inside the weight."""
    values = D.scale(tensors, codes, group, D)
    tl.static_assert(values.dtype == tl.float32, "decoder " + D.name + " does not give float32 values")
    return rounded(tl.where(inside, values, 0.0), COMPUTE).to(tl.float32) * x


@triton.jit
def gemv_tile_kernel(
    tensors,
    x,
    bias,
    y,
    N,
    K,
    stride_xk,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
):
    """y [1, N]: x [1, K] times the weight, plus bias.

    D.split_rows: a byte holds column c of rows i and i + N / 2; else columns 2 c and 2 c + 1 of one row.
    """
    GROUP: tl.constexpr = D.group
    WORDS: tl.constexpr = GROUP if D.split_rows else GROUP // 2
    groups = K // GROUP
    word_rows = N // 2 if D.split_rows else N
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(n, word_rows - 1).to(INDEX)[:, None]
    w = tl.arange(0, WORDS)[None, None, :]
    high_sums = tl.zeros((BN, BG, WORDS), tl.float32)
    low_sums = tl.zeros((BN, BG, WORDS), tl.float32)
    for start in range(0, groups, BG):
        g = (start + tl.arange(0, BG))[None, :, None]
        inside = g < groups
        column = tl.minimum(g, groups - 1)
        group = row * groups + tl.minimum(start + tl.arange(0, BG), groups - 1)[None, :]
        words = tl.load(tensors[0] + group[:, :, None] * WORDS + w).to(tl.int32)
        if D.split_rows:
            high_x = rounded(tl.load(x + (column * GROUP + w) * stride_xk), COMPUTE).to(tl.float32)
            low_x = high_x
            low_group = group + word_rows * groups
        else:
            at = x + (column * GROUP + 2 * w) * stride_xk
            high_x = rounded(tl.load(at), COMPUTE).to(tl.float32)
            low_x = rounded(tl.load(at + stride_xk), COMPUTE).to(tl.float32)
            low_group = group
        high_sums += group_sums(tensors, words >> 4, group, inside, high_x, D, COMPUTE)
        low_sums += group_sums(tensors, words & 0xF, low_group, inside, low_x, D, COMPUTE)
    m = tl.arange(0, 1)
    if D.split_rows:
        high, low = tl.sum(tl.sum(high_sums, 2), 1), tl.sum(tl.sum(low_sums, 2), 1)
        store_result(y, bias, high[None, :], m, n, 1, word_rows, COMPUTE)
        low_bias = bias if bias is None else bias + word_rows
        store_result(y + word_rows, low_bias, low[None, :], m, n, 1, word_rows, COMPUTE)
    else:
        sums = tl.sum(tl.sum(high_sums + low_sums, 2), 1)
        store_result(y, bias, sums[None, :], m, n, 1, N, COMPUTE)
