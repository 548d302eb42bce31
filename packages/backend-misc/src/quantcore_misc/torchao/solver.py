"""How torchao chooses numbers by half-quadratic splitting: scales alone, or zero points under fixed scales.

Source: Badri and Shaji 2023, Half-quadratic quantization of large machine learning models
(https://mobiusml.github.io/hqq_blog/); torchao 0.18, which differs from it in what it stops by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore_misc.torchao.rounding import EPSILON

_ITERATIONS = 20
_NORM = 0.7  # the power of the norm of errors that is made small
_FIRST_BETA, _GROWTH = 10.0, 1.01
_WORST = 1e4  # mean error with which zero points begin
_LARGEST = 2e4  # codes a unit


def fit_scales(weight: Tensor, group_size: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 from low to high, and scales [N, K / G] in the weight's dtype, that fit in least squares.

    Codes and scales are chosen in turn, each the best for the other, until scales change by less than 1e-5.
    """
    grouped = weight.float().unflatten(1, (-1, group_size))
    scale = (grouped.abs().amax(2) / (max(-low, high) or 1)).clamp_(min=EPSILON)
    for _ in range(_ITERATIONS):
        codes = (grouped / scale[:, :, None]).round_().clamp_(low, high)
        above, below = (grouped * codes).sum(2), (codes * codes).sum(2)
        before, scale = scale, torch.where(below > 0, above / below, scale).clamp(min=EPSILON)
        change = (scale - before).abs() / before.clamp(min=EPSILON)
        if change.numel() == 0 or bool(change.max() < 1e-5):
            break
    codes = (grouped / scale[:, :, None]).round_().clamp_(low, high)
    return codes.flatten(1).to(torch.int8), scale.to(weight.dtype)


def fit_zeros(weight: Tensor, group_size: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] uint8 from 0 to high, scales and zero points [N, K / G] float32: w = (code - zero) * scale.

    Zero points are moved until the mean error of all groups together grows.
    """
    grouped = weight.float().reshape(-1, group_size)
    least, most = grouped.aminmax(dim=1, keepdim=True)
    steps = (high / (most - least)).clamp(max=_LARGEST)
    zero = (-least * steps).round_()
    beta, best = _FIRST_BETA, _WORST
    for _ in range(_ITERATIONS):
        codes = _codes(grouped, steps, zero, high)
        error = grouped - (codes - zero) / steps
        zero = (codes - (grouped - _shrunk(error, beta)) * steps).mean(1, keepdim=True)
        beta *= _GROWTH
        mean = float(error.abs().mean())
        if mean >= best:
            break
        best = mean
    codes = _codes(grouped, steps, zero, high).to(torch.uint8)
    table = weight.shape[0], -1
    return codes.view(weight.shape), steps.reciprocal().view(table), zero.view(table)


def _codes(grouped: Tensor, steps: Tensor, zero: Tensor, high: int) -> Tensor:
    return (grouped * steps + zero).round_().clamp_(0, high)


def _shrunk(error: Tensor, beta: float) -> Tensor:
    """The proximal operator of the norm."""
    size = error.abs()
    return error.sign() * (size - size.pow(_NORM - 1) / beta).clamp_(min=0)
