"""LLM.int8() over float weights that are trained: they are rounded anew in each forward pass, and saved as they are.

Source: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339); what bitsandbytes calls has_fp16_weights.
"""

from __future__ import annotations

from torch import nn

from quantcore.sdk import OnlineLinear
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit


class Int8TrainedLinear(OnlineLinear):
    """A linear layer that multiplies as an 8-bit one, over the float weight of another layer.

    threshold: as for `llm_int8.linear`. Raises ValueError naming the row for a magnitude above 65504.
    """

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__(linear, Bnb8Bit(threshold=threshold))
