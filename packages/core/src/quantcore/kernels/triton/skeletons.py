# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernels whose decoder is a parameter. Decoders see only indices inside the weight; edges are masked here.

D: what `Decoder.on_device` gives. COMPUTE: the dtype in which weight and x are multiplied; sums are float32. INDEX: the
integer type that holds N * K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantcore.kernels.triton.rounding import rounded


@triton.jit
def decode_tile(tensors, k, n, N, K, D: tl.constexpr, INDEX: tl.constexpr):
    """float32 [BN, BK]: the weight at rows n [BN] and columns k [BK], whatever lies outside is some value of it."""
    rows = tl.minimum(n, N - 1).to(INDEX)[:, None]
    columns = tl.minimum(k, K - 1)[None, :]
    values = D.decode(tensors, columns, rows, N, K, D)
    tl.static_assert(values.dtype == tl.float32, "decoder " + D.name + " does not give float32 values")
    tl.static_assert(
        len(values.shape) == 2 and values.shape[0] == n.shape[0] and values.shape[1] == k.shape[0],
        "decoder " + D.name + " does not give a tile [BN, BK]",
    )
    return values


@triton.jit
def weight_tile(tensors, k, n, N, K, D: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr):
    """[BN, BK] rounded to COMPUTE, zero beyond column K, where x is zero too but the weight need not be finite."""
    values = decode_tile(tensors, k, n, N, K, D, INDEX)
    return rounded(tl.where((k < K)[None, :], values, 0.0), COMPUTE)


@triton.jit
def x_tile(x, m, k, M, K, stride_xm, stride_xk, COMPUTE: tl.constexpr):
    """[BM, BK] of x rounded to COMPUTE, zero outside."""
    offsets = m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    mask = (m < M)[:, None] & (k < K)[None, :]
    return rounded(tl.load(x + offsets, mask=mask, other=0.0), COMPUTE)


@triton.jit
def store_result(y, bias, sums, m, n, M, N, COMPUTE: tl.constexpr):
    """Writes sums float32 [BM, BN] plus bias to y [M, N], rounded to COMPUTE and then to y's own dtype."""
    if bias is not None:
        added = rounded(tl.load(bias + n, mask=n < N, other=0.0), COMPUTE)
        sums += added.to(tl.float32)[None, :]
    result = rounded(rounded(sums, COMPUTE).to(tl.float32), y.dtype.element_ty)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def dequantize_kernel(tensors, y, N, K, D: tl.constexpr, INDEX: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y [N, K], row-major: the weight, rounded once to y's dtype."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    values = rounded(decode_tile(tensors, k, n, N, K, D, INDEX), y.dtype.element_ty)
    tl.store(y + n.to(INDEX)[:, None] * K + k[None, :], values, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def gemv_kernel(
    tensors,
    x,
    bias,
    y,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x [M, K] times the weight, M <= BM. BM = 1 multiplies and adds, a larger BM uses tensor cores.

    SPLITS = 1: y [M, N] is the result. Else program (i, j) writes its share of the sums to y[j] of float32
    [SPLITS, M, N], and `sum_splits_kernel` finishes.
    """
    m = tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    if BM == 1:
        products = tl.zeros((BN, BK), tl.float32)
    else:
        sums = tl.zeros((BM, BN), tl.float32)
    for start in range(split * BK, K, SPLITS * BK):
        k = start + tl.arange(0, BK)
        weight = weight_tile(tensors, k, n, N, K, D, COMPUTE, INDEX)
        values = x_tile(x, m, k, M, K, stride_xm, stride_xk, COMPUTE)
        if BM == 1:
            products += values.to(tl.float32) * weight.to(tl.float32)
        else:
            sums = tl.dot(values, tl.trans(weight), sums, input_precision="ieee")
    if BM == 1:
        sums = tl.sum(products, 1)[None, :]
    if SPLITS == 1:
        store_result(y, bias, sums, m, n, M, N, COMPUTE)
    else:
        offsets = (split * M + m)[:, None] * N + n[None, :]
        tl.store(y + offsets, sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def sum_splits_kernel(
    shares, bias, y, M, N, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr
):
    """y [M, N]: the float32 sum over shares [SPLITS, M, N], in order, plus bias."""
    m = tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask = (m < M)[:, None] & (n < N)[None, :]
    sums = tl.zeros((BM, BN), tl.float32)
    for split in range(SPLITS):
        sums += tl.load(shares + (split * M + m)[:, None] * N + n[None, :], mask=mask, other=0.0)
    store_result(y, bias, sums, m, n, M, N, COMPUTE)


@triton.jit
def gemm_kernel(
    tensors,
    x,
    bias,
    y,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    D: tl.constexpr,
    COMPUTE: tl.constexpr,
    INDEX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [M, N]: x [M, K] times the weight, plus bias. Programs that run together share rows of the weight in L2."""
    blocks_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // blocks_m) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        weight = weight_tile(tensors, k, n, N, K, D, COMPUTE, INDEX)
        values = x_tile(x, m, k, M, K, stride_xm, stride_xk, COMPUTE)
        sums = tl.dot(values, tl.trans(weight), sums, input_precision="ieee")
    store_result(y, bias, sums, m, n, M, N, COMPUTE)
