"""How far the output of a quantized layer is from that of the float one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PIECE = 1 << 22  # values of an output, or of a product with a Hessian, held together in float32


def output_error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> float:
    """|| (W - Wq) X || / || W X ||, Frobenius norms, over the given inputs.

    weight, quantized: [N, K] of any float dtype; inputs: [..., K], on the same device. 0 for equal outputs, inf where
    only the float layer's outputs are all zero. Computed in float32, summed in float64.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    error = norm = 0.0
    rows = max(1, _PIECE // max(1, x.shape[0]))
    for float_rows, other_rows in zip(weight.split(rows), quantized.split(rows), strict=True):
        expected = x @ float_rows.float().t()
        error += _square_sum(expected - x @ other_rows.float().t())
        norm += _square_sum(expected)
    return _ratio(error, norm)


def output_error_from_hessian(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """`output_error` over the inputs that a Hessian sums up: any multiple of X X^T, [K, K] float32."""
    error = norm = 0.0
    rows = max(1, _PIECE // weight.shape[1])
    for float_rows, other_rows in zip(weight.split(rows), quantized.split(rows), strict=True):
        error += _weighted_sum(float_rows.float() - other_rows.float(), hessian)
        norm += _weighted_sum(float_rows.float(), hessian)
    return _ratio(error, norm)


def _square_sum(values: Tensor) -> float:
    return values.double().square_().sum().item()


def _weighted_sum(rows: Tensor, hessian: Tensor) -> float:
    return max(0.0, (rows @ hessian).mul_(rows).sum(dtype=torch.float64).item())


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm else math.inf
