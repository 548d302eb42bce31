"""What solvers measure on the inputs of a layer, added up batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "max", "min"]
Reduce = Callable[[Tensor, Reduction], None]  # in place, over the processes that calibrate together

_PANEL = 512  # columns of X^T X computed together: smaller saves more of the half below the diagonal


class Statistic:
    """Something measured over all input rows of a layer. `update` gets x [tokens, K] of any float dtype.

    tokens: rows seen so far, over all processes once `reduce` was called.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add the rows of x [tokens, K]."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        """The tensors that hold the statistic, with how those of several processes become one."""
        raise NotImplementedError(f"{type(self).__name__} defines no parts")

    def reduce(self, reduce: Reduce) -> None:
        """Merge with the same statistic of other processes, in place."""
        for tensor, how in self.parts():
            reduce(tensor, how)
        tokens = torch.tensor([self.tokens], dtype=torch.int64, device=self.parts()[0][0].device)
        reduce(tokens, "sum")
        self.tokens = int(tokens)

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no inf went in."""
        return all(bool(torch.isfinite(tensor).all()) for tensor, _ in self.parts()) or self.tokens == 0

    @property
    def is_zero(self) -> bool:
        """Whether every input was zero, or there was none."""
        return self.tokens == 0 or all(not bool(tensor.any()) for tensor, _ in self.parts())


class Hessian(Statistic):
    """H = 2/n sum x x^T over n input rows, in float32: the curvature of the layer's squared output error.

    Source: Frantar et al. 2022, GPTQ, section 3 (arXiv:2210.17323).
    """

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._sum = torch.zeros((columns, columns), dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        x = x.float()
        # The product is symmetric: only panels on and above the diagonal are computed.
        for start in range(0, x.shape[1], _PANEL):
            rows = x[:, start : start + _PANEL]
            self._sum[start : start + _PANEL, start:].addmm_(rows.t(), x[:, start:])
        self.tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """H [K, K] float32, symmetric, a tensor of the caller's own; zeros before the first update."""
        for start in range(_PANEL, self._sum.shape[0], _PANEL):
            self._sum[start:, start - _PANEL : start] = self._sum[start - _PANEL : start, start:].t()
        return self._sum * (2.0 / max(self.tokens, 1))

    def diagonal(self) -> Tensor:
        """The diagonal of H [K]."""
        return self._sum.diagonal() * (2.0 / max(self.tokens, 1))

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self._sum, "sum")]

    @property
    def is_finite(self) -> bool:
        # A NaN or inf in any input lands on the diagonal.
        return bool(torch.isfinite(self._sum.diagonal()).all())

    @property
    def is_zero(self) -> bool:
        return not bool(self._sum.diagonal().any())


class ChannelSquares(Statistic):
    """Sum of x^2 per input channel, float32 [K]: the diagonal of X^T X without the rest."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.total = torch.zeros(columns, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        self.total += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """Mean of x^2 per channel [K]."""
        return self.total / max(self.tokens, 1)

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self.total, "sum")]


class MeanAbs(Statistic):
    """Mean of |x| per input channel, float32 [K]."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._total = torch.zeros(columns, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        self._total += x.abs().sum(0, dtype=torch.float32)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """Mean of |x| per channel [K]; zeros before the first update."""
        return self._total / max(self.tokens, 1)

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self._total, "sum")]


class AbsMax(Statistic):
    """Largest |x| per input channel, float32 [K]."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        if x.shape[0]:
            torch.maximum(self.largest, x.abs().amax(0).float(), out=self.largest)
        self.tokens += x.shape[0]

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self.largest, "max")]


class MinMax(Statistic):
    """Smallest and largest x per input channel, float32 [K]; 0 before the first update.

    The range of the whole tensor is `low.amin()` and `high.amax()`.
    """

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._low = torch.full((columns,), torch.inf, dtype=torch.float32, device=device)
        self._high = torch.full((columns,), -torch.inf, dtype=torch.float32, device=device)

    def update(self, x: Tensor) -> None:
        if x.shape[0]:
            low, high = torch.aminmax(x, dim=0)
            torch.minimum(self._low, low.float(), out=self._low)
            torch.maximum(self._high, high.float(), out=self._high)
        self.tokens += x.shape[0]

    @property
    def low(self) -> Tensor:
        return self._low if self.tokens else torch.zeros_like(self._low)

    @property
    def high(self) -> Tensor:
        return self._high if self.tokens else torch.zeros_like(self._high)

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self._low, "min"), (self._high, "max")]
