"""The AWQ search: which input channels to enlarge before rounding, and where to cut off the range of a group.

Pure functions on weights and on what was measured of a layer's inputs: H = mean of x x^T over tokens [K, K], and the
mean of |x| per channel [K]. An error of the weight D [N, K] makes a mean squared output error of tr(D H D^T), so that
no candidate is run on the inputs themselves. All in float32.
Source: Lin et al. 2024, AWQ (arXiv:2306.00978), section 3.2; the grid of candidates is AutoAWQ's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore_gptq.awq.grid import Grid, round_trip

RATIOS = 20  # candidates of the exponent: 0, 1/20, ..., 19/20
CLIP_STEPS = 10  # candidates of the range: 1, 19/20, ..., 11/20 of the largest magnitude
CLIP_GRID = 20
_CHUNK = 1 << 22  # weight values for which the clip search is done at once


class Reading(NamedTuple):
    """A layer that reads the scaled input. weight: [N, K]; hessian: [K, K] of the input; share: of all its tokens."""

    weight: Tensor
    hessian: Tensor
    share: float = 1.0


class Scales(NamedTuple):
    """The channel scales of one search. best: [K], positive; losses: [RATIOS] float64, of every candidate."""

    best: Tensor
    losses: Tensor


def search_scales(
    readings: Sequence[Reading],
    mean_abs: Tensor,
    grid: Grid,
    *,
    index: Tensor | None = None,
    duo_scaling: bool = True,
) -> Scales:
    """The channel scales with which the weights of all readings, multiplied by them, lose least by rounding.

    mean_abs: [K], of the input. index: [K], channels with one number get one scale. duo_scaling: whether channels with
    small weights are enlarged too. The loss is the squared error of the outputs as a share of their power, added up
    over the readings, so that layers with large outputs, such as queries, do not choose for those with small ones.
    Raises ValueError when no candidate has a finite loss.
    """
    importance = mean_weight([reading.weight for reading in readings], grid.group) if duo_scaling else None
    if index is not None:
        mean_abs = tied(mean_abs, index)
        importance = None if importance is None else tied(importance, index)
    candidates = [candidate(mean_abs, importance, step / RATIOS) for step in range(RATIOS)]
    powers = _powers(readings)
    losses = torch.tensor([_loss(readings, powers, scales, grid) for scales in candidates], dtype=torch.float64)
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    best = int(losses.argmin())
    if not bool(losses[best].isfinite()):
        raise ValueError("no candidate of the scale search has a finite loss; weights or inputs are not finite")
    return Scales(candidates[best], losses)


def _powers(readings: Sequence[Reading]) -> list[float]:
    """What the error of each reading is measured by: its share of the tokens, over the power of its outputs."""
    outputs = [float(output_error(reading.weight.float().clone(), reading.hessian)) for reading in readings]
    return [reading.share / max(power, 1e-30) for reading, power in zip(readings, outputs, strict=True)]


def _loss(readings: Sequence[Reading], powers: Sequence[float], scales: Tensor, grid: Grid) -> float:
    total = 0.0
    for (weight, hessian, _), power in zip(readings, powers, strict=True):
        weight = weight.float()
        error = round_trip(weight * scales, grid).div_(scales).sub_(weight)
        total += power * float(output_error(error, hessian))
    return total


def tied(values: Tensor, index: Tensor) -> Tensor:
    """values [K] with the mean over all channels of one number in index [K] in place of each."""
    numbers, place = index.unique(return_inverse=True)
    place = place.to(values.device)
    total, count = (
        torch.zeros(numbers.numel(), device=values.device).index_add_(0, place, part)
        for part in (values, torch.ones_like(values))
    )
    return (total / count)[place]


def mean_weight(weights: Sequence[Tensor], group: int) -> Tensor:
    """Mean over all rows of each |weight| as a share of the largest in its group, [K]."""
    total, rows = 0.0, 0
    for weight in weights:
        size = weight.float().abs().unflatten(1, (-1, group))
        total = total + size.div_(size.amax(-1, keepdim=True) + 1e-6).flatten(1).sum(0)
        rows += weight.shape[0]
    return torch.as_tensor(total / rows)


def candidate(mean_abs: Tensor, importance: Tensor | None, ratio: float) -> Tensor:
    """Channel scales [K] for one exponent, around 1."""
    scales = mean_abs.pow(ratio)
    if importance is not None:
        scales = scales / (importance.pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, 1.0)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """Mean over tokens and outputs of the squared output error that a weight error [N, K] makes, float64."""
    return (error @ hessian).mul_(error).sum(dtype=torch.float64) / error.shape[0]


def search_clip(weight: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """The largest magnitude to keep in each group, [N, G]: the one with which the group's own output loses least.

    weight: [N, K]. blocks: [G, g, g], those of H on the diagonal (see `diagonal_blocks`).
    """
    rows = max(1, _CHUNK // weight.shape[1])
    return torch.cat(
        [_clip_rows(part.float().unflatten(1, (-1, grid.group)), blocks, grid) for part in weight.split(rows)]
    )


def diagonal_blocks(hessian: Tensor, scales: Tensor, group: int) -> Tensor:
    """The blocks [G, g, g] on the diagonal of the H of inputs that were divided by scales [K]."""
    groups = hessian.shape[0] // group
    blocks = hessian.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse = scales.reciprocal().view(-1, group)
    return blocks * inverse.unsqueeze(1) * inverse.unsqueeze(2)


def clip(weight: Tensor, bound: Tensor) -> Tensor:
    """The weight [N, K] with each group limited to its bound [N, G]."""
    groups, limit = weight.unflatten(1, (bound.shape[1], -1)), bound.to(weight.dtype).unsqueeze(-1)
    return torch.minimum(torch.maximum(groups, -limit), limit).flatten(1)


def _clip_rows(groups: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """Bounds [N, G] of groups [N, G, g]."""
    largest = groups.abs().amax(-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for step in range(CLIP_STEPS):
        bound = largest * (1 - step / CLIP_GRID)
        error = round_trip(clip(groups.flatten(1), bound), grid).view_as(groups).sub_(groups).transpose(0, 1)
        loss = (error @ blocks).mul_(error).sum(-1).T  # [N, G]
        better = loss < least
        best, least = torch.where(better, bound, best), torch.where(better, loss, least)
    return best
