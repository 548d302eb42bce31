"""How torchao rounds the inputs of layers: integers of 8 bits under scales of its own rule, and float8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import Activation

EPSILON = torch.finfo(torch.float32).eps
FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@dataclass(frozen=True, repr=False)
class TokenIntegers(Activation):
    """Integers of 8 bits under scales that are at least `least`, 0 for the smallest normal number of x's dtype.

    Steps are rounded before a zero point shifts them. half_range: the codes are those of 7 bits.
    """

    least: float = 0.0
    half_range: bool = False

    @property
    def code_range(self) -> tuple[float, float]:
        return (-64.0, 63.0) if self.half_range else (-128.0, 127.0)

    def scales(self, x: Tensor, outer: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        smallest, largest = self.code_range
        low, high = (end.unsqueeze(-1) for end in self._ends(x))
        if self.is_symmetric:
            scale = torch.maximum(-low, high) / ((largest - smallest) / 2)
            return self._kept(scale, x.dtype), None
        scale = ((high - low) / (largest - smallest)).clamp(min=self._least(x.dtype))
        zero = (smallest - (low / scale).round_()).clamp_(smallest, largest)
        return self._kept(scale, x.dtype), zero.nan_to_num_(0.0).to(torch.int8)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest of what shares a scale, and 0."""
        if x.shape[-1] == 0:
            return x.sum(-1), x.sum(-1)
        low, high = x.aminmax(dim=-1)
        if self.strategy == "tensor" and low.numel():
            low, high = low.amin().expand(low.shape), high.amax().expand(high.shape)
        return low.clamp(max=0), high.clamp(min=0)

    def _kept(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return scale.clamp(min=self._least(dtype)).to(dtype if self.scale == "input" else torch.float32)

    def _least(self, dtype: torch.dtype) -> float:
        return self.least or torch.finfo(dtype).smallest_normal

    def _resolve(
        self, x: Tensor, scale: Tensor | None, zero: Tensor | None, outer: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        scale, zero = self.scales(x) if scale is None else (scale, zero)
        return scale, zero, scale.reciprocal()

    def _steps(self, x: Tensor, factor: Tensor, zero: Tensor | None) -> Tensor:
        steps = (x * factor).round_()
        return steps if zero is None else steps.add_(zero)


def int8_rounding(strategy: str, *, is_symmetric: bool, half_range: bool = False) -> Activation:
    """How `Int8Weight` rounds its input, "token" by token or as one "tensor"."""
    return TokenIntegers("int8", strategy, is_symmetric=is_symmetric, least=EPSILON, half_range=half_range)


def float8_rounding(
    strategy: str, group_size: int, stored: str, floor: float | None = None, ceiling: float | None = None
) -> Activation:
    """How `Float8Weight` rounds its input."""
    return Activation(
        FLOAT8[stored],
        strategy,
        group_size,
        scale_math="input",
        floor=floor or 0.0,
        ceiling=ceiling,
        bounds_in_input=floor is not None or ceiling is not None,
    )


# How `IntxWeight` rounds its input: every step in the input's dtype.
INTX_ROUNDING = TokenIntegers(
    "int8", "token", is_symmetric=False, scale="input", quotient="multiply", code_math="input"
)
