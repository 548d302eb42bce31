# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
"""The kernels whose decoder is a parameter. Decoders see only indices inside the weight; edges are masked here.

D and T: see `tiles`. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantcore.kernels.triton.rounding import rounded
from quantcore.kernels.triton.tiles import level_tile, tile_rows, weight_tile


@triton.jit
def x_tile(x, m, k, M, K, stride_xm, stride_xk, D: tl.constexpr, T: tl.constexpr):
    """[BM, BK] of x rounded to D.compute, zero outside."""
    offsets = m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    mask = (m < M)[:, None]
    if not T.whole:
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
    T: tl.constexpr,
):
    """float32 [BM, BN]: sums plus values [BM, BK], which are x in the BK columns from start, times the weight there."""
    BK: tl.constexpr = values.shape[1]
    if T.run == BK and sums.shape[0] < BK and D.compute != tl.float32:  # else there are more sums than values to scale
        levels, factors = level_tile(tensors, block, start, n, N, K, D, T, BK)
        levels = rounded(tl.reshape(levels, (n.shape[0], BK)), D.compute)
        products = tl.dot(values, tl.trans(levels), input_precision="ieee")
        sums = tl.fma(products, tl.reshape(factors, (1, n.shape[0])), sums)
    else:
        weight = rounded(weight_tile(tensors, block, start, n, N, K, D, T, BK), D.compute)
        sums = tl.dot(values, tl.trans(weight), sums, input_precision="ieee")
    return sums


@triton.jit
def store_result(y, bias, sums, m, n, M, N, D: tl.constexpr):
    """Writes sums float32 [BM, BN] plus bias to y [M, N], rounded to D.compute and then to y's own dtype."""
    if bias is not None:
        added = rounded(tl.load(bias + n, mask=n < N, other=0.0), D.compute)
        sums += added.to(tl.float32)[None, :]
    result = rounded(rounded(sums, D.compute).to(tl.float32), y.dtype.element_ty)
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def store_share(shares, arrivals, y, bias, sums, m, n, M, N, D: tl.constexpr, SPLITS: tl.constexpr):
    """As `store_result`, of sums over one of SPLITS parts of K: the last of the programs of a tile adds up all.

    shares: float32 [SPLITS, M, N]. arrivals: int32, for each tile how many have come; 0 before and afterwards.
    """
    if SPLITS == 1:
        store_result(y, bias, sums, m, n, M, N, D)
    else:
        tile, split = tl.program_id(0), tl.program_id(1)
        place = m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        size = tl.full([], M, tl.int64) * N
        tl.store(shares + split * size + place, sums, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()  # every thread has written before one says so
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros_like(sums)
            for i in range(SPLITS):  # in this order, whoever came last: the result is always the same
                total += tl.load(shares + i * size + place, mask=mask, other=0.0, cache_modifier=".cg")
            store_result(y, bias, total, m, n, M, N, D)


@triton.jit
def dequantize_kernel(
    tensors,
    y,
    N,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y [N, K], row-major: the weight, rounded once to y's dtype."""
    n = tile_rows(tl.program_id(0), N, D, T, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    values = weight_tile(tensors, tl.program_id(0), tl.program_id(1) * BK, n, N, K, D, T, BK)
    values = rounded(values, y.dtype.element_ty)
    tl.store(y + n.to(T.index)[:, None] * K + k[None, :], values, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def gemv_kernel(
    tensors,
    x,
    bias,
    y,
    shares,
    arrivals,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    D: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    num_stages: tl.constexpr,
):
    """As gemm_kernel, for one row: BM is 1, and no tensor core is used, which would compute 16."""
    AHEAD: tl.constexpr = num_stages if T.run > 1 else None
    m = tl.arange(0, 1)
    n = tile_rows(tl.program_id(0), N, D, T, BN)
    products = tl.zeros((BN, BK), tl.float32)
    for start in tl.range(tl.program_id(1) * BK, K, SPLITS * BK, num_stages=AHEAD):
        weight = weight_tile(tensors, tl.program_id(0), start, n, N, K, D, T, BK)
        values = x_tile(x, m, start + tl.arange(0, BK), M, K, stride_xm, stride_xk, D, T)
        products = tl.fma(values.to(tl.float32), weight, products)
    store_share(shares, arrivals, y, bias, tl.sum(products, 1)[None, :], m, n, M, N, D, SPLITS)


@triton.jit
def gemm_kernel(
    tensors,
    x,
    bias,
    y,
    shares,
    arrivals,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    D: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    num_stages: tl.constexpr,
):
    """y [M, N]: x [M, K] times the weight, plus bias. Programs that run together share rows of the weight in L2.

    SPLITS: how many programs share K; see `store_share`. What tensor cores multiply is read num_stages - 1 tiles ahead,
    as Triton does by itself; with few rows factors too, unless each value has its own, which would take as many copies.
    """
    AHEAD: tl.constexpr = num_stages if BM == 16 and T.run > 1 else None
    blocks_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % blocks_m) * BM + tl.arange(0, BM)
    block = tl.program_id(0) // blocks_m
    n = tile_rows(block, N, D, T, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(tl.program_id(1) * BK, K, SPLITS * BK, num_stages=AHEAD):
        values = x_tile(x, m, start + tl.arange(0, BK), M, K, stride_xm, stride_xk, D, T)
        sums = add_product(sums, values, tensors, block, start, n, N, K, D, T)
    store_share(shares, arrivals, y, bias, sums, m, n, M, N, D, SPLITS)


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
    T: tl.constexpr,
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
        n = tile_rows(block, N, D, T, BN)
        own = expert_tensors(tensors, table, expert, ALIGNED)
        sums = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            values = x_tile(x, m, k, last, K, stride_xm, stride_xk, D, T)
            sums = add_product(sums, values, own, block, start, n, N, K, D, T)
        store_result(y, None, sums, m, n, last, N, D)


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
