"""Searches for the scales of groups, many groups at once: the weighted least squares that llama.cpp's K types rest on.

Groups are columns: values, weights and codes are [n, G] for G groups of n. Sums run over a group in order, since the
choice between trials that are almost as good depends on how they are rounded. A trial takes the place of the best one
where it is strictly better, so that the first of equals stays.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-15  # groups of smaller magnitudes count as zero
_ROUNDS = 5  # of coordinate descent


class Fit(NamedTuple):
    """Scales [G] of groups, with the codes [n, G] that were found along with them."""

    scale: Tensor
    codes: Tensor


class FitWithMinimum(NamedTuple):
    """Scales and minima [G], which are subtracted and never negative, and the codes [n, G] found with them."""

    scale: Tensor
    minimum: Tensor
    codes: Tensor


class Trials(NamedTuple):
    """Trial scales (first + step * i + most) / range of `fit_range`, i from 0 to last. absolute: of what error."""

    first: float
    step: float
    last: int
    absolute: bool = False


def total(terms: Tensor) -> Tensor:
    """The sum of each column [n, G] -> [G], term by term in order."""
    found = terms[0].clone()
    for term in terms[1:]:
        found += term
    return found


def fit_symmetric(x: Tensor, most: int, weights: Tensor | None = None) -> Fit:
    """Scales for codes from -most to most - 1, by the largest share of weighted energy over 19 trials.

    weights: [n, G], None for x**2. The scale of a trial is the one of least squares for its codes.
    """
    peak = peaks(x)
    weights = x * x if weights is None else weights
    trials = [float(most)] + [_as_float32(_as_float32(0.1) * step) + most for step in range(-9, 10) if step]
    inverses = (divide(-trial, peak) for trial in trials)
    return _best_projection(x, weights, peak, inverses, lambda v: v.round_().clamp_(-most, most - 1), -most)


def fit_levels(x: Tensor, nearest: Callable[[Tensor], Tensor], weights: Tensor, inverses: Iterable[Tensor]) -> Tensor:
    """Scales [G] for levels of a table: nearest gives the level of a scaled value, inverses are trial 1 / scale."""
    return _best_projection(x, weights, peaks(x), inverses, nearest, levels_first=True).scale


def peaks(x: Tensor) -> Tensor:
    """The value of largest magnitude in each column, the first of equals; 0 where all are below `EPSILON`."""
    found = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    return found.masked_fill_(found.abs() < EPSILON, 0.0)


def divide(number: float, by: Tensor) -> Tensor:
    """number / by with one rounding; torch's own operator multiplies with the reciprocal, which rounds twice."""
    return torch.div(torch.tensor(number, dtype=by.dtype, device=by.device), by)


def _as_float32(value: float) -> float:
    """The nearest float32, in which llama.cpp computes trial scales."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _best_projection(
    x: Tensor,
    weights: Tensor,
    peak: Tensor,
    inverses: Iterable[Tensor],
    nearest: Callable[[Tensor], Tensor],
    lowest: float = 0.0,
    levels_first: bool = False,
) -> Fit:
    """The fit of the best trial. lowest: the code of values that are all zero. levels_first: in products."""
    scale = best = kept = None
    for inverse in inverses:
        levels = nearest(x * inverse)
        weighted = weights * levels
        dot = total(weighted * x if levels_first else (weights * x).mul_(levels))
        norm = total(weighted.mul_(levels))
        quotient = torch.where(norm > 0, dot / norm, 0.0)
        if best is None or scale is None or kept is None:
            scale, best, kept = quotient, quotient * dot, inverse
            continue
        better = (norm > 0) & (dot * dot > best * norm)
        scale, kept = torch.where(better, quotient, scale), torch.where(better, inverse, kept)
        best = torch.where(better, quotient * dot, best)
    assert scale is not None, "there is a trial"
    assert kept is not None, "there is a trial"
    zero = peak == 0
    return Fit(scale.masked_fill_(zero, 0.0), nearest(x * kept).masked_fill_(zero, lowest))


def fit_range(x: Tensor, most: int, weights: Tensor, trials: Trials) -> FitWithMinimum:
    """Scales and minima for codes from 0 to most, by the least weighted error over trial scales.

    Codes of a trial are those of its scale and of the minimum that is best so far; scale and minimum of the trial are
    the ones of weighted least squares for these codes, the minimum no greater than 0.
    """
    low, high = x.amin(0).clamp_(max=0.0), x.amax(0)
    flat = high == low
    sum_w, sum_x = total(weights), total(weights * x)
    inverse = divide(most, high - low)
    scale, minimum, origin = divide(1, inverse), low, low
    error = _error(x, _codes(x, origin, inverse, most), scale, minimum, weights, trials.absolute)
    best_inverse = inverse
    for index in range(trials.last + 1):
        numerator = _as_float32(_as_float32(trials.first) + _as_float32(_as_float32(trials.step) * index)) + most
        inverse = divide(numerator, high - minimum)
        codes = _codes(x, minimum, inverse, most)
        trial_scale, trial_minimum, usable = _least_squares(x, codes, weights, sum_w, sum_x)
        found = _error(x, codes, trial_scale, trial_minimum, weights, trials.absolute)
        better = usable & (found < error)
        origin, best_inverse = torch.where(better, minimum, origin), torch.where(better, inverse, best_inverse)
        scale, minimum = torch.where(better, trial_scale, scale), torch.where(better, trial_minimum, minimum)
        error = torch.where(better, found, error)
    codes = _codes(x, origin, best_inverse, most).nan_to_num_(0.0).masked_fill_(flat, 0.0)
    return FitWithMinimum(scale.masked_fill(flat, 0.0), torch.where(flat, -low, -minimum), codes)


def _codes(x: Tensor, minimum: Tensor, inverse: Tensor, most: int) -> Tensor:
    return (x - minimum).mul_(inverse).round_().clamp_(0, most)


def _least_squares(
    x: Tensor, codes: Tensor, weights: Tensor, sum_w: Tensor, sum_x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum of weighted least squares, and where they are determined."""
    weighted = weights * codes
    sum_l, sum_l2, sum_xl = total(weighted), total(weighted * codes), total(weighted.mul_(x))
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = minimum > 0
    return torch.where(positive, sum_xl / sum_l2, scale), minimum.masked_fill_(positive, 0.0), determinant > 0


def _error(x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor, weights: Tensor, absolute: bool) -> Tensor:
    difference = (codes * scale).add_(minimum).sub_(x)
    return total((difference.abs_() if absolute else difference.mul_(difference)).mul_(weights))


def fit_three_bits(x: Tensor, most: int = 4) -> Fit:
    """Scales for codes from -most to most - 1 with weights x**2: codes change one by one while that helps."""
    peak = peaks(x)
    weights = x * x
    codes = (x * divide(-most, peak)).round_().clamp_(-most, most - 1).nan_to_num_(0.0)
    dot, norm = total((weights * x).mul_(codes)), total((weights * codes).mul_(codes))
    dot, norm = _descend(x, weights, codes, dot, norm, (-most, most - 1), signed=True)
    scale = torch.where((norm > 0) & (peak != 0), dot / norm, 0.0)
    return Fit(scale, torch.where(peak == 0, -float(most), codes))


def fit_positive(x: Tensor, most: int, weights: Tensor) -> Fit:
    """Scales for codes from 0 to most of values that are not negative, such as scales themselves."""
    peak = x.amax(0).clamp_(min=0.0)
    zero = peak < EPSILON
    inverse = divide(most, peak)
    best = _positive_error(x, inverse, most, weights, capped=False)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = divide(_as_float32(_as_float32(0.1) * step) + most, peak)
        error = _positive_error(x, trial, most, weights)
        better = error < best
        inverse, best = torch.where(better, trial, inverse), torch.where(better, error, best)
    codes = (x * inverse).round_().clamp_(max=most).nan_to_num_(0.0)
    dot, norm = total((weights * x).mul_(codes)), total((weights * codes).mul_(codes))
    dot, norm = _descend(x, weights, codes, dot, norm, (None, most), signed=False)
    return Fit(torch.where((norm > 0) & ~zero, dot / norm, 0.0), codes.masked_fill_(zero, 0.0))


def _positive_error(x: Tensor, inverse: Tensor, most: int, weights: Tensor, capped: bool = True) -> Tensor:
    codes = (x * inverse).round_()
    difference = x - codes.clamp_(max=most if capped else None, min=None if capped else 0).mul_(divide(1, inverse))
    return total((weights * difference).mul_(difference))


def _descend(
    x: Tensor, weights: Tensor, codes: Tensor, dot: Tensor, norm: Tensor, limits: tuple[int | None, int], signed: bool
) -> tuple[Tensor, Tensor]:
    """Change codes in place, one of each group after the other, to what is best for the rest of its group.

    dot, norm: sums of weight * value * code and weight * code**2; returned as they are then.
    """
    done = torch.zeros_like(dot, dtype=torch.bool)
    for _ in range(_ROUNDS):
        changed = torch.zeros_like(done)
        for value, weight, code in zip(x, weights, codes, strict=True):
            rest_dot = dot - (weight * value).mul_(code)
            rest_norm = norm - (weight * code).mul_(code)
            new = (value * rest_norm / rest_dot).round_().clamp_(*limits)
            new_dot, new_norm = rest_dot + (weight * value).mul_(new), rest_norm + (weight * new).mul_(new)
            usable = (rest_dot > 0) & ((new_norm > 0) if signed else (rest_norm > 0))
            better = usable & (new != code) & ~done & (new_dot * new_dot * norm > dot * dot * new_norm)
            code.copy_(torch.where(better, new, code))
            dot, norm = torch.where(better, new_dot, dot), torch.where(better, new_norm, norm)
            changed |= better
        done |= ~changed
        if bool(done.all()):
            break
    return dot, norm
