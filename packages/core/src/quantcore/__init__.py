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
    from quantcore.formats.base import TensorSpec as TensorSpec, WeightFormat as WeightFormat
    from quantcore.formats.quantized_weight import QuantizedWeight as QuantizedWeight
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
    from quantcore.workflows.conversion import convert as convert
    from quantcore.workflows.model import load as load, save as save
    from quantcore.workflows.quantize import quantize_checkpoint as quantize_checkpoint

_TARGETS = {
    "AutoHfQuantizer": "quantcore.quantizers.auto",
    "AutoQuantizationConfig": "quantcore.quantizers.auto",
    "Backend": "quantcore.plugins.backend",
    "Calibration": "quantcore.calibration.data",
    "CalibratedQuantizer": "quantcore.quantizers.calibrated",
    "HfQuantizer": "quantcore.quantizers.base",
    "QuantizationConfigMixin": "quantcore.quantization_config",
    "QuantizationMethod": "quantcore.quantization_config",
    "QuantizedWeight": "quantcore.formats.quantized_weight",
    "TensorSpec": "quantcore.formats.base",
    "WeightFormat": "quantcore.formats.base",
    "WeightQuantizer": "quantcore.quantizers.weight",
    "convert": "quantcore.workflows.conversion",
    "dequantize": "quantcore.quantizers.model",
    "hookimpl": "quantcore.plugins.hookspecs",
    "load": "quantcore.workflows.model",
    "methods": "quantcore.plugins.discovery",
    "nn": "quantcore.nn",
    "option": "quantcore.quantization_config",
    "quantize": "quantcore.quantizers.model",
    "quantize_checkpoint": "quantcore.workflows.quantize",
    "register_quantization_config": "quantcore.quantizers.auto",
    "register_quantizer": "quantcore.quantizers.auto",
    "save": "quantcore.workflows.model",
}

_attribute, _own_names = _lazy.attributes(__name__, _TARGETS)
__all__ = list(_TARGETS)  # `help` shows these


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from quantcore._metadata import own_version

        return own_version()
    if name not in _TARGETS and name.endswith("Config"):  # of a method, by transformers' name
        from quantcore.utils import quantization_config

        if name in quantization_config.CONFIG_CLASSES:
            return getattr(quantization_config, name)
    return _attribute(name)


def __dir__() -> list[str]:
    from quantcore.plugins.discovery import methods
    from quantcore.utils.quantization_config import CONFIG_CLASSES

    installed = {info.method for info in methods() if info.installed}
    return sorted([*_own_names(), *(name for name, method in CONFIG_CLASSES.items() if method in installed)])
