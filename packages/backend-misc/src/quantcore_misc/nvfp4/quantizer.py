"""The quantizer of nvfp4."""

from __future__ import annotations

from torch import nn

from quantcore.sdk import WeightQuantizer
from quantcore_misc.modelopt.format import NvFp4, fp4_format


class NvFp4Quantizer(WeightQuantizer):
    """Every linear layer in one format."""

    def format_for(self, name: str, module: nn.Module) -> NvFp4:
        return fp4_format()
