"""Codebooks and codes of one layer.

Columns are solved one after the other: what one is off is made up for in those after it, as the curvature of the
layer's squared output error says. Codebooks come from k-means, each column weighted by its curvature; those of
residuals from what the first pass leaves, after which a second pass starts over with both.
Source: Liu et al. 2024, VPTQ, sections 3.2 to 3.5 (arXiv:2409.17066).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import float_dtype, held_scales
from quantcore_misc.vectors import QUICK, THOROUGH, fit_centroids, nearest_centroids
from quantcore_misc.vptq.format import Vptq, pack_indices

_DAMP = 0.01
_BLOCK = 128


class _Part(NamedTuple):
    """Columns with a codebook of their own, in the stored order."""

    start: int
    stop: int
    vector: int
    centroids: int
    residuals: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


class _Codebook(NamedTuple):
    main: Tensor  # [k, v] float32, of stored numbers
    residual: Tensor | None


def solve(weight: Tensor, hessian: Tensor | None, weight_format: Vptq) -> tuple[dict[str, Tensor], float | None]:
    """The stored tensors of a weight [N, K], and their loss relative to the weight's.

    hessian: [K, K] float32, the curvature of the layer's squared output error; None rounds each vector to the nearest.
    """
    shape, dtype = tuple(weight.shape), float_dtype(weight_format.float_type, "float_type")
    tensors: dict[str, Tensor] = {}
    values = weight.float()
    if weight_format.has_norm:
        tensors |= _norms(values, dtype)
        values = (values - tensors["weight_bias"].float()) / tensors["weight_scale"].float()
    damped = None if hessian is None else _damped(hessian)
    if damped is not None and weight_format.has_norm:  # what a column is off counts by the column's scale
        scale = tensors["weight_scale"].float()
        damped = _damped(damped * scale * scale[:, None])
    if weight_format.has_order:
        order = torch.arange(shape[1], device=weight.device)
        if damped is not None:
            order = damped.diagonal().argsort(descending=True, stable=True)
            damped = damped[order][:, order]
        tensors["perm"] = torch.where(order > 0x7FFF, order - 0x10000, order).to(torch.int16)
        values = values[:, order]
    importance = torch.ones_like(values[0]) if damped is None else damped.diagonal()
    tensors |= _codes(values, importance, damped, weight_format, dtype)
    ordered = {spec.name: tensors[spec.name] for spec in weight_format.tensor_specs(shape)}
    return ordered, _loss(weight_format.dequantize(ordered, shape, torch.float32), weight.float(), hessian)


def _codes(
    values: Tensor, importance: Tensor, hessian: Tensor | None, weight_format: Vptq, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of codes and codebooks for columns in the stored order."""
    parts = list(_parts(values.shape[1], weight_format))
    rounds = QUICK if hessian is None else THOROUGH
    books = {
        part: _Codebook(_fit(values, importance, part, part.centroids, dtype, rounds=rounds), None) for part in parts
    }
    chosen, left = _pass(values, hessian, parts, books)
    if weight_format.residuals:
        books = {
            part: book._replace(residual=_fit(left, importance, part, part.residuals, dtype, seed=1, rounds=rounds))
            if part.residuals
            else book
            for part, book in books.items()
        }
        chosen, _ = _pass(values, hessian, parts, books)
    tensors: dict[str, Tensor] = {}
    if weight_format.outliers:
        outliers = parts.pop(0)
        codes = chosen.pop(outliers)[0]
        wrapped = torch.where(codes > 0x7FFF, codes - 0x10000, codes)
        tensors["outlier_indices"] = wrapped.to(torch.int16)[None]
        tensors["outlier_centroids.weight"] = books[outliers].main.to(dtype).view(1, -1)
    merged = [chosen[part][0] | (chosen[part][1] << weight_format.main_bits) for part in parts]
    tensors["indices"] = pack_indices(torch.stack(merged), weight_format.index_bits)
    tensors["centroids.weight"] = torch.stack([books[part].main.flatten() for part in parts]).to(dtype)
    residuals = [book.residual for part in parts if (book := books[part]).residual is not None]
    if residuals:
        tensors["res_centroids.weight"] = torch.stack([residual.flatten() for residual in residuals]).to(dtype)
    return tensors


def _parts(columns: int, weight_format: Vptq) -> Iterator[_Part]:
    f = weight_format
    if f.outliers:
        yield _Part(0, f.outliers, f.outlier_vector, f.outlier_centroids, 0)
    size = f.group_columns(columns)
    for group in range(f.groups):
        start = f.outliers + group * size
        yield _Part(start, start + size, f.vector, f.centroids, f.residuals)


def _fit(
    values: Tensor, importance: Tensor, part: _Part, count: int, dtype: torch.dtype, *, rounds: int, seed: int = 0
) -> Tensor:
    """A codebook [count, v] for the columns of a part, of numbers that dtype holds."""
    vectors = _as_vectors(values[:, part.columns], part.vector)  # [n, columns, v]
    weights = importance[part.columns].expand(vectors.shape[:2]).flatten()
    return fit_centroids(vectors.flatten(0, 1), count, weights, rounds=rounds, seed=seed).to(dtype).float()


def _pass(
    values: Tensor, hessian: Tensor | None, parts: list[_Part], books: dict[_Part, _Codebook]
) -> tuple[dict[_Part, tuple[Tensor, Tensor]], Tensor]:
    """Codes and residual codes [n, columns] of each part, and what its codebooks left of each column in its turn."""
    rows = values.shape[0]
    left = torch.empty_like(values)
    chosen = {}
    for part in parts:
        shape = (math.ceil(rows / part.vector), part.stop - part.start)
        chosen[part] = (values.new_zeros(shape, dtype=torch.int64), values.new_zeros(shape, dtype=torch.int64))

    def quantize(part: _Part, columns: slice, weight: Tensor) -> Tensor:
        """The nearest values to columns [N, c], whose codes are put down."""
        vectors = _as_vectors(weight, part.vector)
        flat, book = vectors.flatten(0, 1), books[part]
        code = nearest_centroids(flat, book.main)
        found, place = book.main[code], slice(columns.start - part.start, columns.stop - part.start)
        chosen[part][0][:, place] = code.view(vectors.shape[:2])
        if book.residual is not None:
            rest = nearest_centroids(flat - found, book.residual)
            found = found + book.residual[rest]
            chosen[part][1][:, place] = rest.view(vectors.shape[:2])
        near = found.view(vectors.shape).transpose(1, 2).reshape(-1, weight.shape[1])[:rows]
        left[:, columns] = weight - near
        return near

    if hessian is None:
        for part in parts:
            quantize(part, part.columns, values[:, part.columns])
    else:
        _propagate(values.clone(), _upper_factor(hessian), parts, quantize)
    return chosen, left


def _propagate(
    weight: Tensor, upper: Tensor, parts: list[_Part], quantize: Callable[[_Part, slice, Tensor], Tensor]
) -> None:
    """Quantize column after column; weight [N, K] is changed: later columns make up for what earlier ones are off.

    upper: [K, K], the upper Cholesky factor of the inverse curvature. Source: Frantar et al. 2022, GPTQ, algorithm 1.
    """
    for part in parts:
        for start in range(part.start, part.stop, _BLOCK):
            stop = min(start + _BLOCK, part.stop)
            errors = weight.new_empty(weight.shape[0], stop - start)
            for column in range(start, stop):
                own = slice(column, column + 1)
                error = (weight[:, own] - quantize(part, own, weight[:, own])) / upper[column, column]
                errors[:, column - start] = error[:, 0]
                weight[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            weight[:, stop:] -= errors @ upper[start:stop, stop:]


def _as_vectors(columns: Tensor, length: int) -> Tensor:
    """Columns [N, c] as vectors [ceil(N / v), c, v], the last ones filled with zeros."""
    missing = -columns.shape[0] % length
    padded = torch.nn.functional.pad(columns, (0, 0, 0, missing))
    return padded.view(-1, length, columns.shape[1]).transpose(1, 2)


def _norms(values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The range of each column and its lowest value, as they are stored; a column of one value has the range 1."""
    low, high = values.amin(0), values.amax(0)
    scale = held_scales(high - low, dtype, "weight_scale")
    return {"weight_scale": torch.where(scale == 0, 1, scale), "weight_bias": held_scales(low, dtype, "weight_bias")}


def _damped(hessian: Tensor) -> Tensor:
    """The curvature over its mean diagonal, with a hundredth added to the diagonal."""
    scaled = hessian / hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    scaled.diagonal().add_(_DAMP)
    return scaled


def _upper_factor(hessian: Tensor) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _loss(found: Tensor, weight: Tensor, hessian: Tensor | None) -> float | None:
    if hessian is None:
        return None
    error, damped = found - weight, _damped(hessian)
    size = (weight @ damped).mul_(weight).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    return float((error @ damped).mul_(error).sum() / size)
