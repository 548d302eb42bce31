"""What solvers measure on the inputs of a layer, added up batch by batch.

The sum of one batch is in float32, sums over batches are in float64: there they are exact but for addends 2^29 times
smaller than the sum, so that the result depends neither on the order of batches nor on the processes that run them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantcore.distributed.calibration import Reduction as Reduction

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
    """H = 2/n sum x x^T over n input rows: the curvature of the layer's squared output error.

    Source: Frantar et al. 2022, GPTQ, section 3 (arXiv:2210.17323).
    """

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        # The product is symmetric: only panels on and above the diagonal are held, [up to 512, columns - start].
        self._panels = {
            start: _sums((min(_PANEL, columns - start), columns - start), device) for start in range(0, columns, _PANEL)
        }

    @staticmethod
    def nbytes(columns: int) -> int:
        """Bytes held for so many columns, in float64: little more than the half on and above the diagonal."""
        return sum(8 * min(_PANEL, columns - start) * (columns - start) for start in range(0, columns, _PANEL))

    def update(self, x: Tensor) -> None:
        x = x.float()
        for start, panel in self._panels.items():
            panel += x[:, start : start + _PANEL].t() @ x[:, start:]
        self.tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """H [K, K] float32, symmetric, a tensor of the caller's own; zeros before the first update."""
        columns = len(self.diagonal())
        found = next(iter(self._panels.values())).new_empty((columns, columns), dtype=torch.float32)
        for start, panel in self._panels.items():
            end = start + len(panel)
            found[start:end, start:] = panel * self._factor
            found[end:, start:end] = found[start:end, end:].t()
        return found

    def diagonal(self) -> Tensor:
        """The diagonal of H [K] float32."""
        return (self._diagonal() * self._factor).float()

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(panel, "sum") for panel in self._panels.values()]

    @property
    def is_finite(self) -> bool:
        # A NaN or inf in any input lands on the diagonal.
        return bool(torch.isfinite(self._diagonal()).all())

    @property
    def is_zero(self) -> bool:
        return not bool(self._diagonal().any())

    @property
    def _factor(self) -> float:
        return 2.0 / max(self.tokens, 1)

    def _diagonal(self) -> Tensor:
        return torch.cat([panel.diagonal() for panel in self._panels.values()])


class ChannelSquares(Statistic):
    """Sum of x^2 per input channel [K]: the diagonal of X^T X without the rest."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._total = _sums((columns,), device)

    def update(self, x: Tensor) -> None:
        self._total += x.float().square().sum(0)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """Mean of x^2 per channel [K] float32."""
        return (self._total / max(self.tokens, 1)).float()

    def parts(self) -> list[tuple[Tensor, Reduction]]:
        return [(self._total, "sum")]


class MeanAbs(Statistic):
    """Mean of |x| per input channel [K]."""

    def __init__(self, columns: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._total = _sums((columns,), device)

    def update(self, x: Tensor) -> None:
        self._total += x.abs().sum(0, dtype=torch.float32)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """Mean of |x| per channel [K] float32; zeros before the first update."""
        return (self._total / max(self.tokens, 1)).float()

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


def _sums(shape: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    """Zeros to add to: float64, where the device has it."""
    zeros = torch.zeros(shape, dtype=torch.float32, device=device)
    return zeros if zeros.device.type == "mps" else zeros.double()
