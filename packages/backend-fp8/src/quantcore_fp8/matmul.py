"""Products with 8-bit float weights in plain torch: weights become float32 a few rows at a time, never as a whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quantcore.sdk import QuantizedInput, minifloat, row_chunks


def linear_codes(x: QuantizedInput, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of products of E4M3 codes, times both scales, plus bias, in float32 and rounded once to dtype.

    x.scale: [] or [..., 1]; codes: [N, K]; scale: float32 [N] or [1]. float32 holds each product exactly.
    """
    rows = minifloat.decode(x.codes, minifloat.E4M3).reshape(-1, x.codes.shape[-1])
    x_scale, scale = x.scale.reshape(-1, 1), scale.expand(codes.shape[0])
    y = torch.empty(rows.shape[0], codes.shape[0], dtype=dtype, device=codes.device)
    for part in row_chunks(codes.shape):
        sums = functional.linear(rows, minifloat.decode(codes[part], minifloat.E4M3))
        sums = sums.mul_(x_scale).mul_(scale[part]) if x_scale.numel() > 1 else sums.mul_(x_scale * scale[part])
        y[:, part] = sums if bias is None else sums.add_(bias[part].float())
    return y.view(*x.codes.shape[:-1], codes.shape[0])
