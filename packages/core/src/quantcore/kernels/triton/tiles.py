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
    if D.words_vector > 1:
        levels = vector_tile(tensors, block, start, rows, groups, N, K, D, T, BK)
    else:
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
def vector_tile(tensors, block, start, rows, groups, N, K, D: tl.constexpr, T: tl.constexpr, BK: tl.constexpr):
    """float32 [BN, BK / T.run, T.run]: sums of the codebooks' entries, in the order of the codebooks."""
    BN: tl.constexpr = rows.shape[0]
    V: tl.constexpr = D.words_vector
    BOOKS: tl.constexpr = D.words_books  # what static_range is given must be a constexpr, not an int
    CODES: tl.constexpr = T.run // V  # codes of a group
    shape: tl.constexpr = (BN, BK // T.run, CODES, V)
    total = tl.zeros(shape, tl.float32)
    for book in tl.static_range(BOOKS):
        if BOOKS > 1:  # the codes of a vector's books are neighbours
            first, columns = start // V, K // V
            codes = load_plane(
                tensors[0],
                block,
                first,
                N,
                columns,
                D.words_bits,
                1,
                1,
                1,
                BOOKS,
                book,
                0,
                D.words_transposed,
                T,
                BN,
                BK // V,
            )
        else:
            codes = load_codes(tensors[0], block, start // V, N, K // V, D, T, BN, BK // V)
            if D.words_codes == 1:  # in words of their own dtype, of which codes may be a part
                codes = codes.to(tl.int32) & ((1 << D.words_bits) - 1)
        codes = tl.reshape(codes, (BN, BK // T.run, CODES, 1))
        values = D.vector(tensors, codes, book, rows, groups, N, K, D)
        check_values(values, shape, D)
        total += values
    return tl.reshape(total, (BN, BK // T.run, T.run))


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
    """[BN, BK] of codes, zero outside the weight: each word of a tile is loaded once, neighbours in memory together."""
    if D.words_along == "stream":
        codes = load_stream(words, block, start, N, K, D, T, BN, BK)
    elif D.words_block > 0 or D.words_lanes > 1:
        codes = load_planes(words, block, start, N, K, D, T, BN, BK)
    else:
        codes = load_runs(words, block, start, N, K, D, T, BN, BK)
    return codes


@triton.jit
def load_planes(words, block, start, N, K, D: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int32 or float32 [BN, BK]: codes in blocks of columns, whose high bits may stand in words of their own."""
    codes = load_plane(
        words,
        block,
        start,
        N,
        K,
        D.words_bits,
        D.words_codes,
        D.words_lanes,
        D.words_block,
        D.words_stride,
        D.words_offset,
        D.words_order,
        D.words_transposed,
        T,
        BN,
        BK,
    )
    if D.words_high_bits > 0:
        high = load_plane(
            words,
            block,
            start,
            N,
            K,
            D.words_high_bits,
            D.words_codes * D.words_bits // D.words_high_bits,
            D.words_high_lanes,
            D.words_block,
            D.words_stride,
            D.words_high_offset,
            0,
            D.words_transposed,
            T,
            BN,
            BK,
        )
        codes |= high << D.words_bits
    if D.words_numbers:
        codes = codes.to(tl.float32)
    return codes


@triton.jit
def load_plane(
    words,
    block,
    start,
    N,
    K,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    ORDER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """int32 [BN, BK] of some bits of codes, zero outside the weight.

    Columns come in runs of CODES * LANES: word l of a run holds those of its columns l, l + LANES, l + 2 * LANES, ...
    A tile may hold a part of a run, whose words the tiles of the other parts load too. BLOCK: columns, a whole number
    of runs, whose words follow each other from word OFFSET of STRIDE; 0 where the runs of a row are one block.
    """
    HELD: tl.constexpr = CODES if CODES * LANES <= BK else BK // LANES  # codes of a word that a tile holds
    RUNS: tl.constexpr = BK // (LANES * HELD)
    row = (block * BN + tl.arange(0, BN))[:, None, None, None]
    first = start + tl.arange(0, RUNS) * (LANES * HELD)
    if BLOCK > 0:
        width = K // BLOCK * STRIDE
        word = first // BLOCK * STRIDE + OFFSET + first % BLOCK // (CODES * LANES) * LANES
    else:
        width = K // CODES
        word = first // (CODES * LANES) * LANES
    word = word[None, :, None, None] + tl.arange(0, LANES)[None, None, None, :]
    if TRANSPOSED:
        offsets = word.to(T.index) * N + row
    else:
        offsets = row.to(T.index) * width + word
    if T.whole:
        loaded = tl.load(words + offsets)
    else:
        loaded = tl.load(words + offsets, mask=(row < N) & (first < K)[None, :, None, None], other=0)
    code = tl.arange(0, HELD)[None, :]
    if HELD < CODES:
        code += (first // LANES % CODES)[:, None]
    if ORDER != 0:
        code = ((ORDER >> (4 * code).to(tl.int64)) & 0xF).to(tl.int32)
    codes = (loaded.to(tl.int32) >> (code * BITS)[None, :, :, None]) & (0xFFFFFFFF >> (32 - BITS))
    return tl.reshape(codes, (BN, BK))


@triton.jit
def load_stream(words, block, start, N, K, D: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """int32 or float32 [BN, BK]: codes of rows that are streams of bits, in units of whole words, zero outside."""
    CODES: tl.constexpr = D.words_codes
    WORDS: tl.constexpr = D.words_stride  # that hold so many codes
    SIZE: tl.constexpr = CODES * D.words_bits // WORDS  # bits of a word
    units = K // CODES
    row = (block * BN + tl.arange(0, BN))[:, None, None]
    unit = (start // CODES + tl.arange(0, BK // CODES))[None, :, None]
    bit = (tl.arange(0, CODES) * D.words_bits)[None, None, :]
    codes = tl.zeros((BN, BK // CODES, CODES), tl.uint32)
    for i in tl.static_range(WORDS):
        if D.words_transposed:
            offsets = (unit.to(T.index) * WORDS + i) * N + row
        else:
            offsets = (row.to(T.index) * units + unit) * WORDS + i
        if T.whole:
            loaded = tl.load(words + offsets)
        else:
            loaded = tl.load(words + offsets, mask=(row < N) & (unit < units), other=0)
        loaded = loaded.to(tl.int32).to(tl.uint32, bitcast=True)
        if SIZE < 32:
            loaded &= (1 << SIZE) - 1
        place = bit - i * SIZE  # of each code in this word; negative for one that begins in an earlier word
        part = tl.where(place < 0, loaded << tl.maximum(-place, 0), loaded >> tl.maximum(place, 0))
        codes |= tl.where((place < SIZE) & (place > -D.words_bits), part, 0)
    codes = (codes & ((1 << D.words_bits) - 1)).to(tl.int32)
    if D.words_numbers:
        codes = codes.to(tl.float32)
    return tl.reshape(codes, (BN, BK))


@triton.jit
def load_runs(
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
    """[BN, BK] of codes, zero outside the weight, of words that follow each other without gaps."""
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
