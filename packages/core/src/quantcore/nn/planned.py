"""One layer that is going to be quantized: what calibration and quantizers hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.formats.base import WeightFormat
from quantcore.nn.dense import DenseLinear


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that will be quantized."""

    name: str
    dense: DenseLinear
    weight_format: WeightFormat
