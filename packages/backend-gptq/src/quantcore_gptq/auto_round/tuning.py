"""SignRound on one layer: offsets of rounding and factors of ranges, moved by the signs of their gradients.

The gradients are written out: with a straight-through derivative of rounding they are sums over what the forward pass
has at hand, so no graph of element-wise steps is kept. The bounds of a grid belong to it: a code on a bound moves with
its offset, one beyond it does not. Autograd of torch up to 2.13 has that rule for clamp, with which published models
were made; from 2.14 it gives 0 on a bound, which would hold the outermost codes of every group where they are. The rule
is kept, so that the same data gives the same codes under each torch. Source: Cheng et al. 2023, SignRound
(arXiv:2309.05516), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore_gptq.auto_round.grid import Groups, Scales, asymmetric_scales, symmetric_scales

_PART = 1 << 17  # weights taken at a time


@dataclass(frozen=True)
class Parameters:
    """What is tuned. offset: added before rounding, [N, G, size]; factors: of each group's lower and upper limit."""

    offset: Tensor
    low_factor: Tensor
    high_factor: Tensor


class TunedWeight:
    """A weight [N, K] on its grid under parameters that `step` moves.

    The parameters are replaced, never changed in place, so that keeping the best ones costs no copy. Rows are taken a
    few at a time: what is computed of them stays in the cache of a core until they are done.
    """

    def __init__(self, groups: Groups, bits: int, sym: bool, tunes_range: bool = True) -> None:
        self._groups, self._bits, self._sym, self._tunes_range = groups, bits, sym, tunes_range
        ones = torch.ones_like(groups.low)
        self._now = self._best = Parameters(torch.zeros_like(groups.values), ones, ones)

    def write(self, weight: Tensor) -> None:
        """Write the dequantized weight into a tensor [N, K]."""
        scales = self._scales(self._now)
        for rows in self._parts():
            codes = self._steps(self._now, scales, rows).clamp_(0, self._top)
            weight[rows] = self._groups.ungroup(codes.sub_(scales.zero[rows]).mul_(scales.scale[rows]))

    def keep(self) -> None:
        """Remember the present parameters as the best."""
        self._best = self._now

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """Move against the gradient of the loss for the dequantized weight [N, K]."""
        scales, offset = self._scales(self._now), torch.empty_like(self._now.offset)
        scale_grad, shift_grad = torch.zeros_like(scales.scale), torch.zeros_like(scales.scale)
        for rows in self._parts():
            grouped, steps = self._regroup(grad[rows]), self._steps(self._now, scales, rows)
            codes = steps.clamp(0, self._top)
            outside = steps.sub_(codes).abs_().clamp_(max=1)  # 1 or 0; torch is many times slower with bools
            direction = (grouped * scales.scale[rows]).sign_()
            direction.addcmul_(direction, outside, value=-1)
            torch.sub(self._now.offset[rows], direction, alpha=rate, out=offset[rows])
            if self._tunes_range:
                moved = self._moved(scales, rows, outside)
                scale_grad[rows] = codes.sub_(scales.zero[rows]).sub_(moved).mul_(grouped).sum(2, keepdim=True)
            if self._tunes_range and not self._sym:
                shift_grad[rows] = grouped.mul_(outside).sum(2, keepdim=True)
        low, high = self._now.low_factor, self._now.high_factor
        if self._tunes_range:
            low_grad, high_grad = self._range_grads(scale_grad, shift_grad)
            low = low.sub(low_grad.sign_(), alpha=range_rate).clamp_(0, 1)
            high = high.sub(high_grad.sign_(), alpha=range_rate).clamp_(0, 1)
        self._now = Parameters(offset, low, high)

    def result(self) -> tuple[Tensor, Scales]:
        """Codes [N, K] and scales of the best parameters."""
        scales = self._scales(self._best)
        codes = self._steps(self._best, scales, slice(None)).clamp_(0, self._top)
        return self._groups.ungroup(codes), scales

    @property
    def _top(self) -> float:
        return float((1 << self._bits) - 1)

    def _parts(self) -> Iterator[slice]:
        rows = max(1, _PART // max(1, self._groups.values[0].numel()))
        return (slice(first, first + rows) for first in range(0, len(self._groups.values), rows))

    def _scales(self, parameters: Parameters) -> Scales:
        scales = symmetric_scales if self._sym else asymmetric_scales
        return scales(self._groups, self._bits, parameters.low_factor, parameters.high_factor)

    def _steps(self, parameters: Parameters, scales: Scales, rows: slice) -> Tensor:
        """Codes of some rows before they are limited, as whole numbers."""
        steps = torch.div(self._groups.values[rows], scales.scale[rows]).add_(parameters.offset[rows])
        return steps.round_().add_(scales.zero[rows])

    def _moved(self, scales: Scales, rows: slice, outside: Tensor) -> Tensor:
        """What code - zero follows of some rows when the scale changes, in units of the scale.

        w = (code - zero) * scale, and inside the range code - zero is values / scale + offset, rounded. Outside, the
        code is fixed, and an asymmetric zero point, which is -low / scale, still moves with the range.
        """
        values = self._groups.values[rows]
        moved = torch.addcmul(values, values, outside, value=-1)
        if not self._sym:
            moved.addcmul_(self._groups.low[rows] * self._now.low_factor[rows], outside)
        return moved.div_(scales.scale[rows])

    def _range_grads(self, scale_grad: Tensor, shift_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for the two factors, [N, G, 1], of those for the scale and for the zero point in value units."""
        low, high = self._groups.low, self._groups.high
        if not self._sym:
            return (shift_grad - scale_grad / self._top) * low, scale_grad / self._top * high
        half = float(1 << (self._bits - 1))
        by_low = -low * self._now.low_factor > high * self._now.high_factor
        low_grad, high_grad = torch.where(by_low, -low * scale_grad, 0.0), torch.where(by_low, 0.0, -high * scale_grad)
        return low_grad / half, high_grad / half

    def _regroup(self, grad: Tensor) -> Tensor:
        """A gradient [rows, K] as float32 [rows, G, size]."""
        missing = self._groups.values.shape[1] * self._groups.values.shape[2] - grad.shape[1]
        padded = torch.nn.functional.pad(grad.float(), (0, missing)) if missing else grad.float()
        grouped: Tensor = padded.unflatten(1, self._groups.values.shape[1:])
        return grouped
