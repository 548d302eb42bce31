"""LLM.int8(): rows of int8 codes, and a matmul that keeps outlier columns of the input in float.

Source: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339), sections 3.1 and 3.2, with the roundings of bitsandbytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.sdk import int8_product

_LEVELS = 127.0
_INV_LEVELS = 7.874015718698502e-3  # 1/127 as upstream rounds it
# 1/127**2 is 6.2000124e-05; upstream's portable backend has this misprint, 1.8e-5 too large and below what half
# precision resolves. It is kept, for the codes of the next layer's input depend on the last bit of this one's output.
_INV_LEVELS_SQUARED = 6.200124e-05
_CHUNK = 1 << 20  # elements that are held in float32 at a time


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and the largest magnitude of each row, float32 [N].

    weight: [N, K] float; it is rounded to float16 first, as upstream does. Ties round to even; a row of zeros gets
    codes and scale 0. Raises ValueError naming the first row with a value that float16 cannot hold.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    row_max = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows].to(torch.float16).float()
        codes[start : start + rows], row_max[start : start + rows] = _round_rows(part)
    if not bool(torch.isfinite(row_max).all()):
        row = int((~torch.isfinite(row_max)).nonzero()[0])
        raise ValueError(f"row {row} holds a magnitude above 65504, which 8-bit weights cannot; leave this layer float")
    return codes, row_max


def dequantize_rows(codes: Tensor, row_max: Tensor, dtype: torch.dtype) -> Tensor:
    """code * row_max / 127 in float32, from left to right, rounded once to dtype."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = max(1, _CHUNK // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], rows):
        part = codes[start : start + rows].float()
        weight[start : start + rows] = part.mul_(row_max[start : start + rows, None]).mul_(_INV_LEVELS)
    return weight


def linear(x: Tensor, codes: Tensor, row_max: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """x @ W.T + bias: int8 products, and float products for the columns of x that hold an outlier.

    x: [..., K] float; codes: [N, K] int8; row_max: [N]; an outlier is an element of at least threshold, 0 for none.
    The result has x's leading shape and dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    half = rows.to(torch.float16)
    outliers = (half.abs() >= threshold) if threshold > 0 else None
    columns = outliers.any(0).nonzero().flatten() if outliers is not None else rows.new_empty(0, dtype=torch.int64)
    inner = half.float() if outliers is None else half.float().masked_fill_(outliers, 0.0)
    x_codes, x_max = _round_rows(inner)
    if rows.shape[0] > 1:  # upstream keeps the small values of an outlier column in int8 when there is one row
        x_codes[:, columns] = 0
    y = int8_product.int8_matmul(
        x_codes, codes, int8_product.Scaled(x_max, row_max, x.dtype, bias, _INV_LEVELS_SQUARED)
    )
    if columns.numel():
        outer = dequantize_rows(codes.index_select(1, columns), row_max, x.dtype)
        y = torch.addmm(y, rows[:, columns], outer.t())
    return y.view(*x.shape[:-1], codes.shape[0])


def _round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and largest magnitude of each row of float32 values, which are overwritten."""
    if values.shape[1] == 0:
        return values.to(torch.int8), values.new_zeros(values.shape[0])
    row_max = values.abs().amax(1)
    inv_scale = torch.where(row_max > 0, _LEVELS / row_max, 0.0)
    return values.mul_(inv_scale[:, None]).round_().to(torch.int8), row_max
