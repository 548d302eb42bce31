"""How the scales of blocks are chosen: one function for each tool that writes checkpoints.

They differ in the last bit. Each takes the largest magnitude of the blocks, in the weight's dtype, and that of the
element, and gives what weights are multiplied by and what is stored as the multiplier of codes, both float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantcore.sdk import minifloat

Scales = tuple[Tensor, Tensor]

_LEAST_AMAX = 1e-4  # of DeepGEMM's casts
_LEAST_ROW_AMAX = 1e-12  # of FBGEMM's quantize_fp8_row
_MOST_FACTOR = 2.0**126  # the largest whose reciprocal is a normal number; beyond it scales become 0
_MANTISSA = 23  # bits of a float32


def transformers_scales(amax: Tensor, power_of_two: bool, largest: float) -> Scales:
    """largest / amax and its reciprocal, rounded up to a power of two where asked; a block of zeros has 1."""
    amax = amax.float()
    factor = torch.where(amax > 0, (largest / amax).clamp_(max=_MOST_FACTOR), 1.0)
    scale = factor.reciprocal()
    if not power_of_two:
        return factor, scale
    scale = torch.exp2(torch.log2(scale.clamp_min(torch.finfo(torch.float32).tiny)).ceil_())
    return scale.reciprocal(), scale


def deepgemm_scales(amax: Tensor, power_of_two: bool, largest: float) -> Scales:
    """amax / largest and its reciprocal, amax no less than 1e-4."""
    scale = amax.float().clamp(min=_LEAST_AMAX) / largest
    if power_of_two:
        exponent = minifloat.power_of_two_above(scale).clamp_(1, 254)
        scale = (exponent << _MANTISSA).view(torch.float32)
    return scale.reciprocal(), scale


def fbgemm_scales(amax: Tensor, power_of_two: bool, largest: float) -> Scales:
    """largest / amax and its reciprocal, amax no less than 1e-12 in its own dtype."""
    factor = largest / amax.clamp(min=_LEAST_ROW_AMAX).float()
    factor.masked_fill_(factor.isinf(), 1.0)
    return factor, factor.reciprocal()


WRITERS: dict[str, Callable[[Tensor, bool, float], Scales]] = {
    "transformers": transformers_scales,
    "deepgemm": deepgemm_scales,
    "fbgemm": fbgemm_scales,
}
