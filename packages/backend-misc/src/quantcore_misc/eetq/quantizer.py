"""The quantizer of EETQ."""

from __future__ import annotations

from torch import nn

from quantcore.sdk import WeightQuantizer
from quantcore_misc.eetq.format import FORMAT, Eetq


class EetqQuantizer(WeightQuantizer):
    """Every linear layer in one format."""

    def format_for(self, name: str, module: nn.Module) -> Eetq:
        return FORMAT
