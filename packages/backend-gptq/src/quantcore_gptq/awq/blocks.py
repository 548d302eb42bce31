"""The search over one block: scales for each input, then limits for each group, then rounding by the format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.sdk import ROUND_TO_NEAREST, statistics
from quantcore_gptq.awq.folding import divide, multiply_columns, row_index
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.awq.solver import (
    Reading,
    clip,
    diagonal_blocks,
    output_error,
    search_clip,
    search_scales,
)

if TYPE_CHECKING:
    from quantcore.sdk import Block
    from quantcore_gptq.awq.folding import Fold

# Layers whose outputs are multiplied with each other: limits on their values cost more than their own error shows.
_NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv")


class InputStatistics(statistics.Statistic):
    """What the search reads of a layer's inputs: H and the mean of |x| per channel."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._squares, self._size = statistics.Hessian(columns, device), statistics.MeanAbs(columns, device)

    def update(self, x: Tensor) -> None:
        self._squares.update(x)
        self._size.update(x)
        self.tokens += x.shape[0]

    def parts(self) -> list[tuple[Tensor, statistics.Reduction]]:
        return [*self._squares.parts(), *self._size.parts()]

    @property
    def is_finite(self) -> bool:
        return self._squares.is_finite

    @cached_property
    def hessian(self) -> Tensor:
        """Mean of x x^T over tokens, [K, K]; read once all inputs are in."""
        self._squares.tokens = self.tokens
        return self._squares.matrix().div_(2)

    @property
    def mean_abs(self) -> Tensor:
        """Mean of |x| per channel, [K]."""
        self._size.tokens = self.tokens
        return self._size.mean()


class BlockSolver:
    """A block while it is solved. Weights are scaled in float32 copies, so that the model's dtype rounds nothing."""

    def __init__(self, block: Block, measured: Mapping[str, InputStatistics]) -> None:
        self.block = block
        self.measured = measured
        self.weights = {name: layer.dense.weight.float() for name, layer in block.layers.items()}
        self.scales = {name: torch.ones_like(weight[0]) for name, weight in self.weights.items()}

    def solve(self, folds: Sequence[Fold]) -> None:
        """Scale inputs as the folds allow, then replace every layer."""
        if _are_independent(self.block, folds):
            costs = [float(sum(self.weights[name].numel() for name in self._names(fold))) for fold in folds]
            for fold, scales in zip(folds, self.block.spread(costs, lambda i: self._search(folds[i])), strict=True):
                self._scale(fold, scales)
        else:
            for fold in folds:
                self._scale(fold, self._search(fold))
        self.block.share([(name,) for name in self.block.layers], lambda names: self._round(names[0]))

    def _names(self, fold: Fold) -> list[str]:
        return [f"{self.block.name}.{name}" for name in fold.layers]

    def _search(self, fold: Fold) -> Tensor | None:
        """The best scales of a fold's input; None where no token reaches it."""
        names = self._names(fold)
        reached = [name for name in names if self.measured[name].tokens]
        if not reached:
            return None
        index = row_index(self.block.module, fold, self.weights[names[0]].shape[1])
        grid = self._format(names[0]).grid(self.weights[names[0]].shape)
        return search_scales(self._readings(reached), self._mean_abs(reached), grid, index=index).best

    def _scale(self, fold: Fold, scales: Tensor | None) -> None:
        if scales is None:
            return
        module, names = self.block.module, self._names(fold)
        scales = scales.to(self.weights[names[0]].device)
        producer = f"{self.block.name}.{fold.producer}"
        scales = divide(module, fold, scales, self.weights.get(producer))
        for other in fold.others:
            multiply_columns(module, other, scales)
        for name in names:
            self.weights[name].mul_(scales)
            self.scales[name] = scales

    def _round(self, name: str) -> None:
        statistic, weight, scales = self.measured[name], self.weights.pop(name), self.scales[name]
        form, grid = self._format(name), self._format(name).grid(weight.shape)
        if not statistic.tokens:
            tensors = form.fit(weight)
            self.block.replace(name, tensors, method=ROUND_TO_NEAREST, reason="no calibration token reaches it")
            return
        limited = weight
        if not any(part in name.rpartition(".")[2] for part in _NOT_CLIPPED):
            limited = clip(weight, search_clip(weight, diagonal_blocks(statistic.hessian, scales, grid.group), grid))
        tensors = form.fit(limited)
        error = form.dequantize(tensors, tuple(weight.shape), torch.float32).sub_(weight).div_(scales)
        self.block.replace(name, tensors, loss=float(output_error(error, statistic.hessian)))

    def _readings(self, names: Sequence[str]) -> list[Reading]:
        most = max(self.measured[name].tokens for name in names)
        return [
            Reading(self.weights[name], statistic.hessian, statistic.tokens / most)
            for name in names
            for statistic in (self.measured[name],)
        ]

    def _mean_abs(self, names: Sequence[str]) -> Tensor:
        """Mean of |x| per channel over the tokens of all layers named, those of a shared input once."""
        measured = list({id(self.measured[name]): self.measured[name] for name in names}.values())
        tokens = sum(statistic.tokens for statistic in measured)
        return torch.stack([statistic.mean_abs * (statistic.tokens / tokens) for statistic in measured]).sum(0)

    def _format(self, name: str) -> Awq | AwqMarlin:
        weight_format = self.block.layers[name].weight_format
        assert isinstance(weight_format, Awq | AwqMarlin)
        return weight_format


def _are_independent(block: Block, folds: Sequence[Fold]) -> bool:
    """Whether no fold changes a weight that a later one reads, so that they may be searched in any order."""
    changed: set[str] = set()
    for fold in folds:
        if changed & set(fold.layers):
            return False
        changed |= {*fold.layers, fold.producer}
    return True
