# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Tiles of the weight: from a decoder that gathers, or from words that are loaded once each and split here.

RUN says which: 0 where D gathers, else how many neighbouring columns of a tile share what D.scale loads, a divisor of
BK. Values outside the weight are zero beyond column K, any beyond row N. INDEX: the integer type that holds N * K.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(block, N, D: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr):
    """[BN]: the rows that tile `block` holds, N for none. Neighbours, except where words hold rows apart."""
    i = tl.arange(0, BN)
    n = block * BN + i
    if RUN > 0 and D.words_along == "apart":
        WORDS: tl.constexpr = BN // D.words_codes
        word_row = block * WORDS + i % WORDS
        step = N // D.words_codes
        n = tl.where(word_row < step, word_row + i // WORDS * step, N)
    return n


@triton.jit
def weight_tile(
    tensors, block, start, n, N, K, D: tl.constexpr, INDEX: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr
):
    """float32 [BN, BK]: the weight at rows n [BN], which are `tile_rows` of block, and the BK columns from start."""
    BN: tl.constexpr = n.shape[0]
    k = start + tl.arange(0, BK)
    rows = tl.minimum(n, N - 1).to(INDEX)[:, None]
    if RUN == 0:
        values = D.decode(tensors, tl.minimum(k, K - 1)[None, :], rows, N, K, D)
        check_values(values, (BN, BK), D)
    else:
        codes = tl.reshape(load_codes(tensors[0], block, start, N, K, D, INDEX, BN, BK), (BN, BK // RUN, RUN))
        values = D.scale(tensors, codes, rows, tile_groups(start, K, D, BK // RUN, RUN)[None, :], N, K, D)
        check_values(values, (BN, BK // RUN, RUN), D)
        values = tl.reshape(values, (BN, BK))
    return tl.where((k < K)[None, :], values, 0.0)


@triton.jit
def tile_groups(start, K, D: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    """[RUNS]: the group of each run of columns, the last one for those beyond column K."""
    first = start + tl.arange(0, RUNS) * RUN
    groups = tl.zeros_like(first)
    if D.words_group > 0:
        groups = tl.minimum(first, K - 1) // D.words_group
    return groups


@triton.jit
def load_codes(words, block, start, N, K, D: tl.constexpr, INDEX: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK] of codes, zero outside the weight: each word is loaded once, neighbours in memory together."""
    CODES: tl.constexpr = D.words_codes
    ALONG_K: tl.constexpr = D.words_along == "k"
    WN: tl.constexpr = BN if ALONG_K else BN // CODES
    WK: tl.constexpr = BK // CODES if ALONG_K else BK
    word_rows = N if ALONG_K else N // CODES
    columns = K // CODES if ALONG_K else K
    row = (block * WN + tl.arange(0, WN))[:, None]
    column = ((start // CODES if ALONG_K else start) + tl.arange(0, WK))[None, :]
    if D.words_transposed:
        offsets = column.to(INDEX) * word_rows + row
    else:
        offsets = row.to(INDEX) * columns + column
    mask = (row < word_rows) & (column < columns)
    AXIS: tl.constexpr = 2 if ALONG_K else 1 if D.words_along == "n" else 0
    if CODES > 1:
        offsets, mask = tl.expand_dims(offsets, AXIS), tl.expand_dims(mask, AXIS)
    loaded = tl.load(words + offsets, mask=mask, other=0)
    if CODES == 1:
        codes = loaded
    else:
        codes = split_words(loaded.to(tl.int32), AXIS, D)
    return tl.reshape(codes, (BN, BK))


@triton.jit
def split_words(words, AXIS: tl.constexpr, D: tl.constexpr):
    """int32: the codes of words, along AXIS, where words have one element; a code stays in the thread of its word."""
    place = (D.words_order >> (4 * tl.arange(0, D.words_codes)).to(tl.int64)) & 0xF
    shift = (place * D.words_bits).to(tl.int32)
    for axis in tl.static_range(3):
        if axis != AXIS:
            shift = tl.expand_dims(shift, axis)
    return (words >> shift) & ((1 << D.words_bits) - 1)


@triton.jit
def look_up(table, codes):
    """The entry of table [L], L a power of two, for each code in a tile, from shared memory: for a decoder's scale.

    A tl.load of each entry would be turned into as many copies between memories by Triton's pipelining.
    """
    return tl.reshape(tl.gather(table, tl.ravel(codes), 0), codes.shape)


@triton.jit
def check_values(values, shape: tl.constexpr, D: tl.constexpr):
    """Fails to compile with the decoder's name when values are not float32 of this shape."""
    tl.static_assert(values.dtype == tl.float32, "decoder " + D.name + " does not give float32 values")
    tl.static_assert(values.shape == shape, "decoder " + D.name + " does not give a tile [BN, BK]")
