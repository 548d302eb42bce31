"""The shrinkage of the HQQ solver: what a weight's error is set to before the zero point is fitted to it.

Source: Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/.
"""

from __future__ import annotations

from torch import Tensor

LP_NORM = 0.7
BETA = 10.0

# Shrinkage leaves 0 below |error| = BETA ** (-1 / (2 - LP_NORM)) = 0.1701; a tile is shrunk from a safe distance
# below on.
SHRINK_FROM = 0.16


def shrink(residual: Tensor, magnitude: Tensor) -> Tensor:
    """Generalized soft threshold of the l_p norm: sign(e) * max(|e| - |e|**(p - 1) / beta, 0)."""
    return magnitude.pow(LP_NORM - 1).mul_(-1 / BETA).add_(magnitude).clamp_(min=0).mul_(residual.sign())
