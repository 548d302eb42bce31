"""K-means over short vectors: what the methods with codebooks share.

Source: Lloyd 1982, Least squares quantization in PCM; weighted as in VPTQ (arXiv:2409.17066), section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QUICK, THOROUGH = 6, 100  # rounds where no data says what a weight is worth, and where it does
_PAIRS = 1 << 24  # of vectors and centroids that are compared at a time
_CONVERGED = 1e-5  # relative fall of the error below which more rounds bring nothing
_SAMPLES_A_CENTROID = 128
_MOST_SPREAD = 4096  # centroids that are begun with one after the other; more take too long


def fit_centroids(
    vectors: Tensor, count: int, weights: Tensor | None = None, *, rounds: int = THOROUGH, seed: int = 0
) -> Tensor:
    """Centroids [count, v] float32 that are near all vectors [P, v], each by its weight [P]; the same at every call.

    No more than 128 vectors for each centroid are looked at. Where there are no more vectors than centroids, the
    centroids are the vectors, and zeros. rounds: of Lloyd's algorithm, at most; QUICK ones begin with any vectors.
    Raises ValueError for vectors so long that float32 does not hold their squares.
    """
    vectors = vectors.float()
    _check_squares(vectors)
    if vectors.shape[0] <= count:
        padding = vectors.new_zeros(count - vectors.shape[0], vectors.shape[1])
        return torch.cat([vectors, padding])
    generator = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(vectors.shape[0], generator=generator, device="cpu")[: _SAMPLES_A_CENTROID * count]
    chosen = chosen.to(vectors.device)
    vectors = vectors[chosen]
    weights = torch.ones_like(vectors[:, 0]) if weights is None else weights.float()[chosen]
    centroids = vectors[:count].clone()
    if rounds > QUICK:
        centroids = _spread(vectors, weights, count, generator)
    best = torch.inf
    for _ in range(rounds):
        nearest, distance = _nearest(vectors, centroids)
        error = float((distance * weights).sum())
        if error >= best * (1 - _CONVERGED):
            break
        best = error
        centroids = _means(vectors, weights, nearest, centroids)
    return centroids


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The number [P] int64 of the centroid [C, v] nearest to each vector [P, v], the first among equals."""
    return _nearest(vectors.float(), centroids.float())[0]


def _check_squares(vectors: Tensor) -> None:
    squares = float(vectors.square().sum(1).max()) if vectors.numel() else 0.0
    if not math.isfinite(squares):
        raise ValueError(
            f"a weight reaches {float(vectors.abs().max()):g}, whose square float32 does not hold; make it smaller"
        )


def _spread(vectors: Tensor, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Vectors to begin with, each drawn by its weight and its squared distance from those drawn before.

    Source: Arthur and Vassilvitskii 2007, k-means++: the advantages of careful seeding.
    """
    if count > _MOST_SPREAD:
        return vectors[:count].clone()
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").tolist()
    distance = torch.full_like(weights, torch.inf)
    centroids = vectors.new_empty(count, vectors.shape[1])
    for number, draw in enumerate(draws):
        mass = (weights if number == 0 else weights * distance).double().cumsum(0)
        place = torch.searchsorted(mass, mass[-1:] * draw, right=True).clamp_(max=len(vectors) - 1)
        centroids[number] = vectors[place[0]]
        distance = torch.minimum(distance, (vectors - centroids[number]).square().sum(1))
    return centroids


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [P] of the nearest centroids, and squared distances [P]."""
    half_squares = centroids.square().sum(1) / 2
    numbers = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    gains = vectors.new_empty(vectors.shape[0])
    step = max(1, _PAIRS // centroids.shape[0])
    for start in range(0, vectors.shape[0], step):
        part = slice(start, start + step)
        gains[part], numbers[part] = torch.addmm(-half_squares, vectors[part], centroids.t()).max(1)
    return numbers, (vectors.square().sum(1) - 2 * gains).clamp_(min=0)


def _means(vectors: Tensor, weights: Tensor, nearest: Tensor, centroids: Tensor) -> Tensor:
    """The weighted means of the vectors that belong to each centroid; a centroid that has none stays."""
    total = torch.zeros_like(centroids).index_add_(0, nearest, vectors * weights[:, None])
    weight = torch.zeros_like(centroids[:, 0]).index_add_(0, nearest, weights)[:, None]
    return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float32).tiny), centroids)
