# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
"""The kernels whose decoder is a parameter. Decoders see only indices inside the weight; edges are masked here.

D: what `Decoder.on_device` gives. RUN, INDEX, WHOLE, SPREAD: see `tiles`. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantcore.kernels.triton.rounding import rounded
from quantcore.kernels.triton.tiles import level_tile, tile_rows, weight_tile


@triton.jit
def x_tile(x, m, k, M, K, stride_xm, stride_xk, D: tl.constexpr, WHOLE: tl.constexpr):
    """[BM, BK] of x rounded to D.compute, zero outside."""
    offsets = m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    mask = (m < M)[:, None]
    if not WHOLE:
        mask &= (k < K)[None, :]
    return rounded(tl.load(x + offsets, mask=mask, other=0.0), D.compute)


@triton.jit
def add_product(
    sums,
    values,
    tensors,
    block,
    start,
    n,
    N,
    K,
    D: tl.constexpr,
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    RUN: tl.constexpr,
):
    """float32 [BM, BN]: sums plus values [BM, BK], which are x in the BK columns from start, times the weight there."""
    BK: tl.constexpr = values.shape[1]
    if RUN == BK and D.compute != tl.float32:
        levels, factors = level_tile(tensors, block, start, n, N, K, D, INDEX, WHOLE, SPREAD, BK, RUN)
        levels = rounded(tl.reshape(levels, (n.shape[0], BK)), D.compute)
        products = tl.dot(values, tl.trans(levels), input_precision="ieee")
        sums = tl.fma(products, tl.reshape(factors, (1, n.shape[0])), sums)
    else:
        weight = rounded(weight_tile(tensors, block, start, n, N, K, D, INDEX, WHOLE, SPREAD, BK, RUN), D.compute)
        sums = tl.dot(values, tl.trans(weight), sums, input_precision="ieee")
    return sums


@triton.jit
def store_result(y, bias, sums, m, n, M, N, COMPUTE: tl.constexpr):
    """Writes sums float32 [BM, BN] plus bias to y [M, N], rounded to COMPUTE and then to y's own dtype."""
    if bias is not None:
        added = rounded(tl.load(bias + n, mask=n < N, other=0.0), COMPUTE)
        sums += added.to(tl.float32)[None, :]
    result = rounded(rounded(sums, COMPUTE).to(tl.float32), y.dtype.element_ty)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def dequantize_kernel(
    tensors,
    y,
    N,
    K,
    D: tl.constexpr,
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    RUN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [N, K], row-major: the weight, rounded once to y's dtype."""
    n = tile_rows(tl.program_id(0), N, D, BN, RUN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    values = weight_tile(tensors, tl.program_id(0), tl.program_id(1) * BK, n, N, K, D, INDEX, WHOLE, SPREAD, BK, RUN)
    values = rounded(values, y.dtype.element_ty)
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
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    num_stages: tl.constexpr,
):
    """x [M, K] times the weight, M <= BM. BM = 1 multiplies and adds, a larger BM uses tensor cores.

    SPLITS = 1: y [M, N] is the result. Else program (i, j) writes its share of the sums to y[j] of float32
    [SPLITS, M, N], and `sum_splits_kernel` finishes.

    With BM = 1 the loop reads num_stages - 1 tiles ahead, which Triton does by itself for tensor cores alone; but not
    where each value has a scale of its own, which would take as many copies.
    """
    AHEAD: tl.constexpr = num_stages if BM == 1 and RUN > 1 else None
    m = tl.arange(0, BM)
    n = tile_rows(tl.program_id(0), N, D, BN, RUN)
    split = tl.program_id(1)
    if BM == 1:
        products = tl.zeros((BN, BK), tl.float32)
    else:
        sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(split * BK, K, SPLITS * BK, num_stages=AHEAD):
        k = start + tl.arange(0, BK)
        values = x_tile(x, m, k, M, K, stride_xm, stride_xk, D, WHOLE)
        if BM == 1:
            weight = weight_tile(tensors, tl.program_id(0), start, n, N, K, D, INDEX, WHOLE, SPREAD, BK, RUN)
            products = tl.fma(values.to(tl.float32), weight, products)
        else:
            sums = add_product(sums, values, tensors, tl.program_id(0), start, n, N, K, D, INDEX, WHOLE, SPREAD, RUN)
    if BM == 1:
        sums = tl.sum(products, 1)[None, :]
    if SPLITS == 1:
        store_result(y, bias, sums, m, n, M, N, D.compute)
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
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    RUN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [M, N]: x [M, K] times the weight, plus bias. Programs that run together share rows of the weight in L2."""
    blocks_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    block = tl.program_id(0) // blocks_m
    n = tile_rows(block, N, D, BN, RUN)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        values = x_tile(x, m, k, M, K, stride_xm, stride_xk, D, WHOLE)
        sums = add_product(sums, values, tensors, block, start, n, N, K, D, INDEX, WHOLE, SPREAD, RUN)
    store_result(y, bias, sums, m, n, M, N, D.compute)


@triton.jit
def grouped_kernel(
    tensors,
    table,
    x,
    ends,
    y,
    E,
    N,
    K,
    stride_xm,
    stride_xk,
    D: tl.constexpr,
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    SPREAD: tl.constexpr,
    RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [M, N]: row m of x [M, K] times the weight of its expert, the first e with m < ends[e].

    table: int64 [E, T], where each expert's tensors lie, all at multiples of 16 bytes if ALIGNED. tensors: those of one
    expert, for their dtypes. There are as many programs as blocks of BM rows could be needed; those without rows end.
    """
    block_m = tl.program_id(0) // tl.cdiv(N, BN)
    block = tl.program_id(0) % tl.cdiv(N, BN)
    expert, first, last = rows_of_block(ends, block_m, E, BE, BM)
    if expert < E:
        m = first + tl.arange(0, BM)
        n = tile_rows(block, N, D, BN, RUN)
        own = expert_tensors(tensors, table, expert, ALIGNED)
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            values = x_tile(x, m, k, last, K, stride_xm, stride_xk, D, WHOLE)
            sums = add_product(sums, values, own, block, start, n, N, K, D, INDEX, WHOLE, SPREAD, RUN)
        store_result(y, None, sums, m, n, last, N, D.compute)


@triton.jit
def rows_of_block(ends, block_m, E, BE: tl.constexpr, BM: tl.constexpr):
    """The expert of a block of rows, E for none, and its rows: the first of the block, and the end of the expert."""
    e = tl.arange(0, BE)
    until = tl.load(ends + e, mask=e < E, other=0).to(tl.int32)
    begins = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0).to(tl.int32)
    blocks = tl.cdiv(until - begins, BM)
    expert = tl.sum(((tl.cumsum(blocks, 0) <= block_m) & (e < E)).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, blocks, 0), 0)
    begin = tl.sum(tl.where(e == expert, begins, 0), 0)
    return expert, begin + (block_m - before) * BM, tl.sum(tl.where(e == expert, until, 0), 0)


@triton.jit
def expert_tensors(tensors, table, expert, ALIGNED: tl.constexpr):
    """The tensors of one expert."""
    own = ()
    for i in tl.static_range(len(tensors)):
        tensor = tl.load(table + expert * len(tensors) + i).to(tensors[i].dtype)
        if ALIGNED:
            tensor = tl.multiple_of(tensor, 16)
        own = own + (tensor,)  # noqa: RUF005 - what Triton compiles
    return own
