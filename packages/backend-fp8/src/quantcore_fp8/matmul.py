"""Products with 8-bit float weights in plain torch: weights become float32 a few rows at a time, never as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from quantcore.formats.activation import QuantizedInput
from quantcore.formats.blocks import row_pieces
from quantcore.formats.minifloat import E4M3, decode


def linear_rows(
    x: Tensor, weight_of: Callable[[slice], Tensor], shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x [..., K] times a weight [N, K], plus bias, summed in float32 and rounded once to dtype.

    weight_of: gives rows of the weight, float32 [n, K].
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    y = torch.empty(rows.shape[0], shape[0], dtype=dtype, device=x.device)
    for part in row_pieces(shape):
        y[:, part] = functional.linear(rows, weight_of(part), None if bias is None else bias[part].float())
    return y.view(*x.shape[:-1], shape[0])


def linear_codes(x: QuantizedInput, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of products of E4M3 codes, times both scales, plus bias, in float32 and rounded once to dtype.

    x.scale: [] or [..., 1]; codes: [N, K]; scale: float32 [N] or [1]. float32 holds each product exactly.
    """
    rows = decode(x.codes, E4M3).reshape(-1, x.codes.shape[-1])
    x_scale, scale = x.scale.reshape(-1, 1), scale.expand(codes.shape[0])
    y = torch.empty(rows.shape[0], codes.shape[0], dtype=dtype, device=codes.device)
    for part in row_pieces(codes.shape):
        sums = functional.linear(rows, decode(codes[part], E4M3))
        sums = sums.mul_(x_scale).mul_(scale[part]) if x_scale.numel() > 1 else sums.mul_(x_scale * scale[part])
        y[:, part] = sums if bias is None else sums.add_(bias[part].float())
    return y.view(*x.codes.shape[:-1], codes.shape[0])
