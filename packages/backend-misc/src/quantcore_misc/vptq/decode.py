# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The decoder of VPTQ weights: vectors down a column, looked up by numbers that lie across words."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat, float_dtype, rounded
from quantcore_misc.vptq.format import PLACES, Vptq


class Vectors(NamedTuple):
    """The fields of `Vptq`, lengths those of vectors. main_bits, index_bits: of a code, and of it with its residual's.

    What begins with at_ is the operand of that kind, -1 where there is none.
    """

    length: int
    centroids: int
    residuals: int
    groups: int
    outliers: int
    outlier_length: int
    outlier_centroids: int
    main_bits: int
    index_bits: int
    has_residuals: bool
    has_outliers: bool
    has_order: bool
    has_norm: bool
    at_indices: int
    at_centroids: int
    at_residuals: int
    at_outlier_indices: int
    at_outlier_centroids: int
    at_places: int
    at_scale: int
    at_offset: int


@triton.jit
def decode(tensors, k, n, N, K, D: tl.constexpr):
    """The vectors' sum, times the scale of its column, plus its offset: each step rounded, as the reference does."""
    column = k
    if D.has_order:
        column = tl.load(tensors[D.at_places] + k)
    values = sum_of_vectors(tensors, tl.maximum(column - D.outliers, 0), n, N, K, D)
    if D.has_outliers:
        single = vector_of_outlier(tensors, tl.minimum(column, D.outliers - 1), n, D)
        values = tl.where(column < D.outliers, single, values)
    if D.has_norm:
        values = step(values * number(tensors[D.at_scale] + k, D), D)
        values = step(values + number(tensors[D.at_offset] + k, D), D)
    return values


@triton.jit
def sum_of_vectors(tensors, column, n, N, K, D: tl.constexpr):
    """float32: entries of the main codebook, and of that of residuals, in columns that have groups."""
    COLUMNS = (K - D.outliers) // D.groups
    words = (COLUMNS * D.index_bits + 31) // 32
    group, within = column // COLUMNS, column % COLUMNS
    row = group * ((N + D.length - 1) // D.length) + n // D.length
    code = code_in_words(tensors[D.at_indices] + row * words, within, words, D)
    main = (code & (D.centroids - 1)).to(tl.int32)
    values = number(tensors[D.at_centroids] + (group * D.centroids + main) * D.length + n % D.length, D)
    if D.has_residuals:
        rest = tl.minimum((code >> D.main_bits).to(tl.int32), D.residuals - 1)
        entry = (group * D.residuals + rest) * D.length + n % D.length
        values = step(values + number(tensors[D.at_residuals] + entry, D), D)
    return values


@triton.jit
def code_in_words(words, i, count, D: tl.constexpr):
    """int64: number i of a row of `count` words; it may begin in one word and end in the next."""
    first = i * D.index_bits
    place = first // 32
    low = tl.load(words + place).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(words + tl.minimum(place + 1, count - 1)).to(tl.int64) << 32
    return ((low | high) >> (first % 32).to(tl.int64)) & ((1 << D.index_bits) - 1)


@triton.jit
def vector_of_outlier(tensors, column, n, D: tl.constexpr):
    """float32: entries of the codebook of outliers."""
    code = tl.load(tensors[D.at_outlier_indices] + n // D.outlier_length * D.outliers + column).to(tl.int32) & 0xFFFF
    entry = tl.minimum(code, D.outlier_centroids - 1) * D.outlier_length + n % D.outlier_length
    return number(tensors[D.at_outlier_centroids] + entry, D)


@triton.jit
def number(place, D: tl.constexpr):
    """float32 of what is stored, in the dtype that the weight is computed in."""
    return step(tl.load(place).to(tl.float32), D)


@triton.jit
def step(values, D: tl.constexpr):
    """float32 of values rounded to the dtype that the weight is computed in."""
    return rounded(values, D.compute).to(tl.float32)


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of VPTQ's weights; None for any other format."""
    if not isinstance(weight_format, Vptq) or float_dtype(weight_format.float_type, "float_type") not in TRITON_DTYPES:
        return None
    names = weight_format.operand_names((weight_format.vector, weight_format.outliers + weight_format.groups))
    at = {name: place for place, name in enumerate(names)}
    return Decoder(
        name=f"vptq vectors of {weight_format.vector}",
        decode=decode,
        constants=Vectors(
            length=weight_format.vector,
            centroids=weight_format.centroids,
            residuals=weight_format.residuals,
            groups=weight_format.groups,
            outliers=weight_format.outliers,
            outlier_length=weight_format.outlier_vector,
            outlier_centroids=weight_format.outlier_centroids,
            main_bits=weight_format.main_bits,
            index_bits=weight_format.index_bits,
            has_residuals=bool(weight_format.residuals),
            has_outliers=bool(weight_format.outliers),
            has_order=weight_format.has_order,
            has_norm=weight_format.has_norm,
            at_indices=at["indices"],
            at_centroids=at["centroids.weight"],
            at_residuals=at.get("res_centroids.weight", -1),
            at_outlier_indices=at.get("outlier_indices", -1),
            at_outlier_centroids=at.get("outlier_centroids.weight", -1),
            at_places=at.get(PLACES, -1),
            at_scale=at.get("weight_scale", -1),
            at_offset=at.get("weight_bias", -1),
        ),
        views=(None,) * len(names),
        dtype=float_dtype(weight_format.float_type, "float_type"),
    )
