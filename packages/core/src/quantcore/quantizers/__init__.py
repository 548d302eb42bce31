"""Quantizers drive a model through load, quantize, save and dequantize for one config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcore import _lazy

if TYPE_CHECKING:
    from quantcore.quantizers.auto import (
        AutoHfQuantizer as AutoHfQuantizer,
        AutoQuantizationConfig as AutoQuantizationConfig,
    )
    from quantcore.quantizers.base import HfQuantizer as HfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer as CalibratedQuantizer
    from quantcore.quantizers.weight import WeightQuantizer as WeightQuantizer

__getattr__, __dir__ = _lazy.attributes(
    __name__,
    {
        "AutoHfQuantizer": "quantcore.quantizers.auto",
        "AutoQuantizationConfig": "quantcore.quantizers.auto",
        "CalibratedQuantizer": "quantcore.quantizers.calibrated",
        "HfQuantizer": "quantcore.quantizers.base",
        "WeightQuantizer": "quantcore.quantizers.weight",
        "register_quantization_config": "quantcore.quantizers.auto",
        "register_quantizer": "quantcore.quantizers.auto",
    },
)
