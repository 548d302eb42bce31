"""Quantization of PyTorch models: every method a plugin, one framework for loading, saving and running them.

    import quantcore as qc

    model = qc.load("folder")  # float or quantized
    qc.quantize(model, {"quant_method": "hqq", "nbits": 4})  # any nn.Module, in place
    qc.save(model, "folder-hqq")  # what the upstream tool reads
    qc.dequantize(model)

`methods` lists what is installed, `quantize_checkpoint` and `convert` go from folder to folder, `nn.QuantizedLinear`
is one layer. `WeightFormat`, `WeightQuantizer`, `QuantizationConfigMixin` and `Backend` are what a method is made of.
"""

from __future__ import annotations

from quantcore import _lazy

TYPE_CHECKING = False  # as in typing, whose import alone would take longer than the rest of this one
if TYPE_CHECKING:
    from typing import Any

    from quantcore import nn as nn
    from quantcore.calibration.data import Calibration as Calibration
    from quantcore.checkpoints.conversion import convert as convert
    from quantcore.checkpoints.model import load as load, save as save
    from quantcore.checkpoints.quantize import quantize_checkpoint as quantize_checkpoint
    from quantcore.formats.base import (
        QuantizedWeight as QuantizedWeight,
        TensorSpec as TensorSpec,
        WeightFormat as WeightFormat,
    )
    from quantcore.plugins.backend import Backend as Backend
    from quantcore.plugins.discovery import methods as methods
    from quantcore.plugins.hookspecs import hookimpl as hookimpl
    from quantcore.quantization_config import (
        QuantizationConfigMixin as QuantizationConfigMixin,
        QuantizationMethod as QuantizationMethod,
        option as option,
    )
    from quantcore.quantizers.auto import (
        AutoHfQuantizer as AutoHfQuantizer,
        AutoQuantizationConfig as AutoQuantizationConfig,
        register_quantization_config as register_quantization_config,
        register_quantizer as register_quantizer,
    )
    from quantcore.quantizers.base import HfQuantizer as HfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer as CalibratedQuantizer
    from quantcore.quantizers.model import dequantize as dequantize, quantize as quantize
    from quantcore.quantizers.weight import WeightQuantizer as WeightQuantizer

_TARGETS = {
    "AutoHfQuantizer": "quantcore.quantizers.auto",
    "AutoQuantizationConfig": "quantcore.quantizers.auto",
    "Backend": "quantcore.plugins.backend",
    "Calibration": "quantcore.calibration.data",
    "CalibratedQuantizer": "quantcore.quantizers.calibrated",
    "HfQuantizer": "quantcore.quantizers.base",
    "QuantizationConfigMixin": "quantcore.quantization_config",
    "QuantizationMethod": "quantcore.quantization_config",
    "QuantizedWeight": "quantcore.formats.base",
    "TensorSpec": "quantcore.formats.base",
    "WeightFormat": "quantcore.formats.base",
    "WeightQuantizer": "quantcore.quantizers.weight",
    "convert": "quantcore.checkpoints.conversion",
    "dequantize": "quantcore.quantizers.model",
    "hookimpl": "quantcore.plugins.hookspecs",
    "load": "quantcore.checkpoints.model",
    "methods": "quantcore.plugins.discovery",
    "nn": "quantcore.nn",
    "option": "quantcore.quantization_config",
    "quantize": "quantcore.quantizers.model",
    "quantize_checkpoint": "quantcore.checkpoints.quantize",
    "register_quantization_config": "quantcore.quantizers.auto",
    "register_quantizer": "quantcore.quantizers.auto",
    "save": "quantcore.checkpoints.model",
}

_attribute, __dir__ = _lazy.attributes(__name__, _TARGETS)
__all__ = list(_TARGETS)  # `help` shows these


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from quantcore._metadata import metadata

        try:
            return metadata.version("quantcore")
        except metadata.PackageNotFoundError:  # run from source through PYTHONPATH
            return "0.1.0"
    return _attribute(name)
