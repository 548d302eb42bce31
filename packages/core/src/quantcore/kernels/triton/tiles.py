# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Tiles of the weight: from a decoder that gathers, or from words that are loaded once each and split here.

Values outside the weight are zero beyond column K, any beyond row N. D: what `Decoder.on_device` gives. T: a `Tiling`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantcore.kernels.triton.rounding import rounded


class Tiling(NamedTuple):
    """How tiles of a launch are read, a constant of kernels.

    index: the integer type that holds N * K. whole: whether no tile reaches beyond the weight, which saves the masks.
    spread: how many words that are neighbours in a row are loaded as one; tensors[0] is seen so. run: 0 where the
    decoder gathers, else how many neighbouring columns of a tile share a factor, a divisor of BK.
    """

    index: Any
    whole: bool
    spread: int
    run: int


@triton.jit
def tile_rows(block, N, D: tl.constexpr, T: tl.constexpr, BN: tl.constexpr):
    """[BN]: the rows that tile `block` holds, N for none. Neighbours, except where words hold rows apart."""
    i = tl.arange(0, BN)
    n = block * BN + i
    if T.run > 0 and D.words_along == "apart":
        WORDS: tl.constexpr = BN // D.words_codes
        word_row = block * WORDS + i // D.words_codes
        step = N // D.words_codes
        n = tl.where(word_row < step, word_row + i % D.words_codes * step, N)
    return n


@triton.jit
def weight_tile(
    tensors,
    block,
    start,
    n,
    N,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BK]: the weight at rows n [BN], which are `tile_rows` of block, and the BK columns from start."""
    k = start + tl.arange(0, BK)
    if T.run == 0:
        inside = k if T.whole else tl.minimum(k, K - 1)
        values = D.decode(tensors, inside[None, :], tile_index(n, N, T), N, K, D)
        check_values(values, (n.shape[0], BK), D)
    else:
        levels, factors = level_tile(tensors, block, start, n, N, K, D, T, BK)
        values = tl.reshape(levels * factors[:, :, None], (n.shape[0], BK))
        if D.rounds is not None:
            values = rounded(values, D.rounds).to(tl.float32)
    if not T.whole:
        values = tl.where((k < K)[None, :], values, 0.0)
    return values


@triton.jit
def level_tile(
    tensors,
    block,
    start,
    n,
    N,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    BK: tl.constexpr,
):
    """float32 [BN, BK / T.run, T.run] and [BN, BK / T.run]: levels and factors, whose products are the weight's values.

    Beyond column K the levels are those of code 0.
    """
    BN: tl.constexpr = n.shape[0]
    RUN: tl.constexpr = T.run  # what functions are given must be a constexpr, not an int
    rows, groups = tile_index(n, N, T), tile_groups(start, K, D, T, BK // RUN)[None, :]
    codes = load_codes(tensors[0], block, start, N, K, D, T, BN, BK)
    levels = D.level(tensors, tl.reshape(codes, (BN, BK // RUN, RUN)), rows, groups, N, K, D)
    check_values(levels, (BN, BK // RUN, RUN), D)
    factors = D.factor(tensors, rows, groups, N, K, D)
    check_values(factors, (BN, BK // RUN), D)
    return levels, factors


@triton.jit
def tile_index(n, N, T: tl.constexpr):
    """[BN, 1]: rows below N."""
    return (n if T.whole else tl.minimum(n, N - 1)).to(T.index)[:, None]


@triton.jit
def tile_groups(start, K, D: tl.constexpr, T: tl.constexpr, RUNS: tl.constexpr):
    """[RUNS]: the group of each run of columns, the last one for those beyond column K."""
    first = start + tl.arange(0, RUNS) * T.run
    groups = tl.zeros_like(first)
    if D.words_group > 0:
        groups = tl.minimum(first, K - 1) // D.words_group
    return groups


@triton.jit
def load_codes(
    words,
    block,
    start,
    N,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """[BN, BK] of codes, zero outside the weight: each word is loaded once, neighbours in memory together."""
    ALONG_K: tl.constexpr = D.words_along == "k"
    DOWN: tl.constexpr = 1 if ALONG_K else D.words_codes  # codes of a column in what is loaded at once
    ACROSS: tl.constexpr = T.spread * (D.words_codes if ALONG_K else 1)  # and of a row
    word_rows, columns = N // DOWN, K // ACROSS
    row = (block * (BN // DOWN) + tl.arange(0, BN // DOWN))[:, None]
    column = (start // ACROSS + tl.arange(0, BK // ACROSS))[None, :]
    if D.words_transposed:
        offsets = column.to(T.index) * word_rows + row
    else:
        offsets = row.to(T.index) * columns + column
    mask = (row < word_rows) & (column < columns)
    if D.words_codes * T.spread > 1:  # before the load, so that the threads that load words split them
        offsets, mask = offsets[:, None, :, None, None], mask[:, None, :, None, None]
    if T.whole:
        loaded = tl.load(words + offsets)
    else:
        loaded = tl.load(words + offsets, mask=mask, other=0)
    if D.words_codes * T.spread == 1:
        codes = loaded
    else:
        codes = split_words(loaded.to(tl.int32), D, T, DOWN)
    return tl.reshape(codes, (BN, BK))


@triton.jit
def split_words(words, D: tl.constexpr, T: tl.constexpr, DOWN: tl.constexpr):
    """int32 or float32 [R, DOWN, C, T.spread, ...]: codes of words [R, 1, C, 1, 1]; a code stays in its word's thread.

    A float32 between 2**(23 - i) and twice that counts in units of its bit i. So the bits of a code at place i, set in
    such a number, are the code above a power of two: one logical operation and a sum for each code, where a shift, a
    mask and a conversion would take three of the slower units.
    """
    CODES: tl.constexpr = D.words_codes
    MASK: tl.constexpr = (1 << D.words_bits) - 1
    place = (D.words_order >> (4 * tl.arange(0, CODES)).to(tl.int64)) & 0xF
    shift = (place * D.words_bits).to(tl.int32)
    if DOWN > 1:
        shift = shift[None, :, None, None, None]
    else:
        shift = shift[None, None, None, None, :]
    shift += (tl.arange(0, T.spread) * (CODES * D.words_bits))[None, None, None, :, None]
    if D.words_numbers:
        half = shift // 16 * 16
        shift -= half
        # An operation takes one constant only. Grids have no third axis, but the compiler does not know that this is 0.
        power = (150 - shift + tl.program_id(2)) << 23
        number = ((words >> half) & (MASK << shift)) | power
        codes = number.to(tl.float32, bitcast=True) - ((150 - shift) << 23).to(tl.float32, bitcast=True)
    else:
        codes = (words >> shift) & MASK
    return codes


@triton.jit
def look_up(table, codes):
    """The entry of table [L], L a power of two, for each code in a tile, from shared memory: for a decoder's level.

    A tl.load of each entry would be turned into as many copies between memories by Triton's pipelining.
    """
    return tl.reshape(tl.gather(table, tl.ravel(codes), 0), codes.shape)


@triton.jit
def check_values(values, shape: tl.constexpr, D: tl.constexpr):
    """Fails to compile with the decoder's name when values are not float32 of this shape."""
    tl.static_assert(values.dtype == tl.float32, "decoder " + D.name + " does not give float32 values")
    tl.static_assert(values.shape == shape, "decoder " + D.name + " does not give a tile of the shape asked for")
