"""Quantizing and dequantizing a whole model in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.weight import WeightQuantizer, dequantize_layers

if TYPE_CHECKING:
    from quantcore.calibration.data import Calibration


def quantize(model: nn.Module, config: Any, calibration: Any = None, **settings: Any) -> nn.Module:
    """Quantize the linear layers of a model in place and return it.

    config: a config, a dict as found in config.json, or a method's name. calibration: for methods that calibrate:
    texts, token ids, model inputs, or a `quantcore.Calibration` of them. settings: fields of that class, such as
    tokenizer=, samples= and seqlen=. Peak memory is the model plus one quantized layer and a few tiles; with
    calibration, plus the activations and statistics of one block.
    Raises ValueError, and leaves the model as it was, when a weight holds NaN or inf, a shape does not fit, the model
    is quantized already, it has no layer to quantize, or calibration data is missing, too much, or unfit.
    """
    if next(quantized_modules(model), None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; quantcore.dequantize it first")
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize a model")
    if isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data:
        return quantizer.calibrate_model(model, _calibration(quantizer, calibration, settings))
    if calibration is not None or settings:
        given = ", ".join(settings) or "calibration data"
        raise ValueError(f"{quantizer._method()} takes no {given}; leave it out")
    return quantizer.quantize_model(model)


def _calibration(quantizer: CalibratedQuantizer, data: Any, settings: Mapping[str, Any]) -> Calibration:
    from quantcore.calibration.data import Calibration

    data = quantizer.default_data if data is None else data
    if data is None:
        raise ValueError(
            f"{quantizer._method()} quantizes with calibration data; pass calibration=, such as a list of texts with "
            "tokenizer=, or token ids [B, T]"
        )
    return Calibration.of(data, **settings)


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
