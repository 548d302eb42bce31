"""Points at which normal numbers are stored with the least squared error: one by one, or in pairs.

Of one dimension they are the Lloyd-Max quantizers of N(0, 1), made here. Of two dimensions they were made by `refine`
and lie beside this module.
Source: Max 1960, Quantizing for minimum distortion; Malinovskii et al. 2024, HIGGS, section 4 (arXiv:2411.17525).
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_PAIRS = Path(__file__).with_name("pairs.safetensors")
_STEPS = 20_000
_CONVERGED = 1e-15
_REACH, _CELLS = 6.0, 481  # of the quadrature of the plane: from -reach to reach, cells a side


@cache
def _grid(points: int, dimension: int) -> Tensor:
    return lloyd_max(points) if dimension == 1 else load_file(_PAIRS)[str(points)]


def normal_grid(points: int, dimension: int) -> Tensor:
    """The points [points, dimension] float32, on the CPU, for 1 or 2 dimensions."""
    return _grid(points, dimension).clone()


def lloyd_max(points: int) -> Tensor:
    """The points [points, 1] float32, ascending: each the mean of the normal numbers nearest to it."""
    levels = torch.linspace(-2.0, 2.0, points, dtype=torch.float64)
    for _ in range(_STEPS):
        edges = torch.cat(
            [levels.new_tensor([-math.inf]), (levels[1:] + levels[:-1]) / 2, levels.new_tensor([math.inf])]
        )
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        share = torch.special.ndtr(edges).diff()
        better = -density.diff() / share
        moved, levels = float((better - levels).abs().max()), better
        if moved < _CONVERGED:
            break
    return ((levels - levels.flip(0)) / 2).float()[:, None]  # symmetric to the last bit


def start_points(points: int) -> Tensor:
    """Points [points, 2] float64 to begin `refine` with: a spiral that is as dense as their best density."""
    number = torch.arange(points, dtype=torch.float64) + 0.5
    # The best density is the square root of the distribution's own: a normal one of twice the variance.
    radius = torch.sqrt(-4 * torch.log1p(-number / points))
    angle = number * math.pi * (3 - math.sqrt(5))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)


def refine(points: Tensor, rounds: int) -> tuple[Tensor, float]:
    """Points [P, 2] float64 after rounds of Lloyd's algorithm, and their squared error for each number.

    The plane is summed up over small cells. Deterministic; float64.
    """
    side = torch.linspace(-_REACH, _REACH, _CELLS, dtype=torch.float64)
    weight = torch.exp(-side.square() / 2)
    cells, weights = torch.cartesian_prod(side, side), torch.outer(weight, weight).flatten()
    weights /= weights.sum()
    error = math.inf
    for _ in range(rounds):
        nearest, error = _assign(cells, weights, points)
        share = torch.zeros(len(points), dtype=torch.float64).index_add_(0, nearest, weights)
        total = torch.zeros_like(points).index_add_(0, nearest, cells * weights[:, None])
        points = torch.where(share[:, None] > 0, total / share[:, None].clamp(min=1e-300), points)
    return points, error


def _assign(cells: Tensor, weights: Tensor, points: Tensor) -> tuple[Tensor, float]:
    """The nearest point to each cell, and the mean squared error of a number."""
    half, nearest, error = points.square().sum(1) / 2, [], 0.0
    for part, weight in zip(cells.split(1 << 15), weights.split(1 << 15), strict=True):
        gain, number = (part @ points.t() - half).max(1)
        nearest.append(number)
        error += float(((part.square().sum(1) - 2 * gain) * weight).sum()) / 2
    return torch.cat(nearest), error
