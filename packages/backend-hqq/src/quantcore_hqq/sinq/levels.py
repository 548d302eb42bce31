"""Tables of values that codes of SINQ may stand for.

Source: sinq 0.2.0 for NF3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.sdk import NF4_LEVELS

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": NF4_LEVELS,
    "nf3": (
        -1.0,
        -0.5350227355957031,
        -0.2469314038753510,
        0.0,
        0.1833375245332718,
        0.3819939494132996,
        0.6229856610298157,
        1.0,
    ),
}


def nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The number of the level nearest each value, uint8; of two as near, the lower."""
    table = torch.tensor(levels, dtype=values.dtype, device=values.device)
    above = torch.bucketize(values, table).clamp_(1, len(levels) - 1)
    is_lower = values - table[above - 1] <= table[above] - values
    return torch.where(is_lower, above - 1, above).to(torch.uint8)
