"""Codes, codebooks and scales of one layer by what its inputs are.

Minimizes tr((W - W') H (W - W')^T), where H is the curvature of the layer's squared output error. In turn, each code is
exchanged for the one that is best given all others, and codebooks and scales take steps down the gradient.
Source: Egiazarian et al. 2024, AQLM, section 3 (arXiv:2401.06118).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore_misc.aqlm.format import Aqlm
from quantcore_misc.vectors import THOROUGH

_STEPS = 100  # of Adam in a round
_RATE = 1e-4
_BETAS = (0.0, 0.95)
_TOLERANCE = 0.01  # relative fall of the loss below which a round was the last
_MOST_ROUNDS = 12
_PAIRS = 1 << 24  # of groups and candidates that are compared at a time


@dataclass
class Solution:
    """What a layer's weight is made of: codes [R, C, M] int64, codebooks [M, 2**bits, v] and scales [R], float32.

    R groups of rows, C groups of columns, v = out_group * in_group values in a vector.
    """

    weight_format: Aqlm
    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def vectors(self) -> Tensor:
        """Sums of the codebooks' vectors, [R, C, v]."""
        parts = (self.codebooks[m][self.codes[..., m]] for m in range(self.codes.shape[-1]))
        return sum(parts, torch.zeros((), device=self.codes.device))

    def weight(self) -> Tensor:
        """The weight [N, K]."""
        rows, columns = self.codes.shape[:2]
        split = (rows, columns, self.weight_format.out_group, self.weight_format.in_group)
        blocks = (self.vectors() * self.scales[:, None, None]).view(split).transpose(1, 2)
        return blocks.reshape(rows * self.weight_format.out_group, columns * self.weight_format.in_group)

    def by_group(self, weight: Tensor) -> Tensor:
        """A weight [N, K] as vectors [R, C, v]."""
        rows, columns = self.codes.shape[:2]
        split = (rows, self.weight_format.out_group, columns, self.weight_format.in_group)
        return weight.view(split).transpose(1, 2).reshape(rows, columns, -1)


def solve(weight: Tensor, hessian: Tensor, weight_format: Aqlm) -> tuple[dict[str, Tensor], float]:
    """The stored tensors of a weight [N, K] under curvature hessian [K, K] float32, and their relative loss.

    Begins with the codebooks of `Aqlm.cluster`. The loss is tr(D H D^T) / tr(W H W^T), D the stored weight less W.
    """
    weight = weight.float()
    start = weight_format.cluster(weight, THOROUGH)
    solution = Solution(
        weight_format,
        start["codes"].long() & ((1 << weight_format.bits) - 1),
        start["codebooks"].float().flatten(2),
        start["scales"].float().flatten(),
    )
    scale = (weight @ hessian).mul_(weight).sum().clamp_(min=torch.finfo(torch.float32).tiny)
    best, loss = start, _loss(weight_format.dequantize(start, tuple(weight.shape)) - weight, hessian, scale)
    for _ in range(_MOST_ROUNDS):
        descend(solution, weight, hessian, scale)
        exchange_codes(solution, weight, hessian)
        stored = _stored(solution, start, tuple(weight.shape))
        now = _loss(weight_format.dequantize(stored, tuple(weight.shape)) - weight, hessian, scale)
        if not now < loss:
            break
        is_last = now > loss * (1 - _TOLERANCE)
        best, loss = stored, now
        if is_last:
            break
    return best, loss


def descend(solution: Solution, weight: Tensor, hessian: Tensor, scale: Tensor) -> None:
    """Steps of Adam on codebooks and scales, whose gradients are written out."""
    parameters = [solution.codebooks, solution.scales]
    optimizer = torch.optim.Adam(parameters, lr=_RATE, betas=_BETAS, amsgrad=True)
    codes = solution.codes.flatten(0, 1)
    for _ in range(_STEPS):
        vectors = solution.vectors()
        slope = solution.by_group(((solution.weight() - weight) @ hessian) * (2 / scale))
        solution.scales.grad = (slope * vectors).sum((1, 2))
        of_vectors = (slope * solution.scales[:, None, None]).flatten(0, 1)
        gradient = torch.zeros_like(solution.codebooks)
        for m in range(codes.shape[1]):
            gradient[m].index_add_(0, codes[:, m], of_vectors)
        solution.codebooks.grad = gradient
        optimizer.step()
    solution.codebooks.grad = solution.scales.grad = None


def exchange_codes(solution: Solution, weight: Tensor, hessian: Tensor) -> None:
    """Exchange each code for the best one given all others; what the weight is off is kept up to date."""
    width = solution.weight_format.in_group
    error = weight - solution.weight()  # [N, K]
    for column in range(solution.codes.shape[1]):
        part = slice(column * width, (column + 1) * width)
        curvature = hessian[part, part]
        for m in range(solution.codes.shape[2]):
            table = solution.codebooks[m].view(-1, solution.weight_format.out_group, width)
            costs = ((table @ curvature) * table).sum((1, 2))  # c H c^T of each vector
            before = _scaled(solution, m, column)
            error[:, part] += before
            slope = (error @ hessian[:, part]).view(solution.scales.numel(), -1)
            for rows in _parts(slope.shape[0], costs.numel()):
                s = solution.scales[rows, None]
                cost = costs * s.square() - 2 * s * (slope[rows] @ table.flatten(1).t())
                solution.codes[rows, column, m] = cost.argmin(1)
            error[:, part] -= _scaled(solution, m, column)


def _scaled(solution: Solution, m: int, column: int) -> Tensor:
    """What one codebook gives one group of columns, [N, in_group]."""
    vectors = solution.codebooks[m][solution.codes[:, column, m]] * solution.scales[:, None]
    return vectors.view(-1, solution.weight_format.in_group)


def _parts(rows: int, candidates: int) -> Iterator[slice]:
    step = max(1, _PAIRS // candidates)
    return (slice(start, start + step) for start in range(0, rows, step))


def _stored(solution: Solution, like: dict[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    codebooks, scales = solution.codebooks.to(like["codebooks"].dtype), solution.scales.to(like["scales"].dtype)
    return solution.weight_format.store(solution.codes.flatten(0, 1), codebooks, scales, shape)


def _loss(error: Tensor, hessian: Tensor, scale: Tensor) -> float:
    return float((error @ hessian).mul_(error).sum() / scale)
