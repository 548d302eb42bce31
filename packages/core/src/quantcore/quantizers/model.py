"""Quantizing and dequantizing a whole model in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.weight import WeightQuantizer, dequantize_layers


def quantize(model: nn.Module, config: Any, calibration: Any = None) -> nn.Module:
    """Quantize the linear layers of a model in place and return it.

    config: a config, a dict as found in config.json, or a method's name. Peak memory is the model plus one quantized
    layer and a few tiles. Raises ValueError, and leaves the model as it was, when a weight holds NaN or inf, a shape
    does not fit, the model is quantized already, or it has no layer to quantize.
    """
    if next(quantized_modules(model), None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; quantcore.dequantize it first")
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize a model")
    if calibration is not None:
        raise ValueError(f"{quantizer.quantization_config.quant_method} takes no calibration data; leave it out")
    return quantizer.quantize_model(model)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Give a quantized model float weights again, in place, one layer at a time, and return it.

    dtype: of the weights; None gives each the dtype it was quantized from. Raises ValueError for a model without
    quantized layers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        dequantized: nn.Module = quantizer.dequantize(model, dtype)
        return dequantized
    if next(quantized_modules(model), None) is None:
        raise ValueError(f"{type(model).__name__} is not quantized by quantcore; there is nothing to dequantize")
    return dequantize_layers(model, dtype)  # layers put in one by one, or left by a quantization that was cut short
