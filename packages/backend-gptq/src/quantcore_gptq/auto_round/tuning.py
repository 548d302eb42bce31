"""SignRound on one layer: offsets of rounding and factors of ranges, moved by the signs of their gradients.

The gradients are written out: with a straight-through derivative of rounding they are sums over what the forward pass
has at hand, so no graph of element-wise steps is kept. Source: Cheng et al. 2023, SignRound (arXiv:2309.05516),
sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore_gptq.auto_round.grid import Groups, Scales, asymmetric_scales, symmetric_scales


@dataclass(frozen=True)
class Parameters:
    """What is tuned. offset: added before rounding, [N, G, size]; factors: of each group's lower and upper limit."""

    offset: Tensor
    low_factor: Tensor
    high_factor: Tensor


class TunedWeight:
    """A weight [N, K] on its grid under parameters that `step` moves.

    The parameters are replaced, never changed in place, so that keeping the best ones costs no copy.
    """

    def __init__(self, groups: Groups, bits: int, sym: bool, tunes_range: bool = True) -> None:
        self._groups, self._bits, self._sym, self._tunes_range = groups, bits, sym, tunes_range
        ones = torch.ones_like(groups.low)
        self._now = self._best = Parameters(torch.zeros_like(groups.values), ones, ones)
        self._last: tuple[Parameters, Scales, Tensor] | None = None  # what `write` rounded, for the step after it

    def write(self, weight: Tensor) -> None:
        """Write the dequantized weight into a tensor [N, K]."""
        scales, steps = self._rounded()
        codes = steps.clamp(0, self._top)
        weight.copy_(self._groups.ungroup(codes.sub_(scales.zero).mul_(scales.scale)))

    def keep(self) -> None:
        """Remember the present parameters as the best."""
        self._best = self._now

    def step(self, grad: Tensor, rate: float, range_rate: float) -> None:
        """Move against the gradient of the loss for the dequantized weight [N, K]."""
        grouped = self._regroup(grad)
        scales, steps = self._rounded()
        codes = steps.clamp(0, self._top)
        inside = codes == steps
        direction = (grouped * scales.scale).sign_().mul_(inside)
        offset = self._now.offset.sub(direction, alpha=rate)
        low, high = self._now.low_factor, self._now.high_factor
        if self._tunes_range:
            low_grad, high_grad = self._range_grads(grouped, scales, codes, inside)
            low = low.sub(low_grad.sign_(), alpha=range_rate).clamp_(0, 1)
            high = high.sub(high_grad.sign_(), alpha=range_rate).clamp_(0, 1)
        self._now = Parameters(offset, low, high)

    def result(self) -> tuple[Tensor, Scales]:
        """Codes [N, K] and scales of the best parameters."""
        scales = self._scales(self._best)
        return self._groups.ungroup(self._steps(scales, self._best).clamp_(0, self._top)), scales

    def _rounded(self) -> tuple[Scales, Tensor]:
        """Scales and unlimited codes under the present parameters."""
        if self._last is None or self._last[0] is not self._now:
            scales = self._scales(self._now)
            self._last = self._now, scales, self._steps(scales, self._now)
        return self._last[1:]

    @property
    def _top(self) -> float:
        return float((1 << self._bits) - 1)

    def _scales(self, parameters: Parameters) -> Scales:
        scales = symmetric_scales if self._sym else asymmetric_scales
        return scales(self._groups, self._bits, parameters.low_factor, parameters.high_factor)

    def _steps(self, scales: Scales, parameters: Parameters) -> Tensor:
        """Codes before they are limited, as whole numbers."""
        return torch.div(self._groups.values, scales.scale).add_(parameters.offset).round_().add_(scales.zero)

    def _range_grads(self, grad: Tensor, scales: Scales, codes: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for the two factors, [N, G, 1].

        w = (code - zero) * scale, and inside the range code - zero is values / scale + offset, rounded. Outside, the
        code is fixed, and an asymmetric zero point, which is -low / scale, still moves with the range.
        """
        low, high = self._groups.low, self._groups.high
        slope = codes.sub(scales.zero)  # dw / dscale where codes are fixed
        outside_limit = torch.zeros_like(low) if self._sym else low * self._now.low_factor
        moved = torch.where(inside, self._groups.values, outside_limit).div_(scales.scale)
        scale_grad = slope.sub_(moved).mul_(grad).sum(2, keepdim=True)
        if self._sym:
            half = float(1 << (self._bits - 1))
            by_low = -low * self._now.low_factor > high * self._now.high_factor
            return torch.where(by_low, -low * scale_grad, 0.0) / half, torch.where(
                by_low, 0.0, -high * scale_grad
            ) / half
        shift_grad = grad.masked_fill(inside, 0.0).sum(2, keepdim=True)
        return (shift_grad - scale_grad / self._top) * low, scale_grad / self._top * high

    def _regroup(self, grad: Tensor) -> Tensor:
        missing = self._groups.values.shape[1] * self._groups.values.shape[2] - grad.shape[1]
        padded = torch.nn.functional.pad(grad.float(), (0, missing)) if missing else grad.float()
        return padded.unflatten(1, self._groups.values.shape[1:])
