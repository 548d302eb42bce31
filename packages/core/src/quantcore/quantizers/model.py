"""Quantizing and dequantizing a whole model in place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.errors import with_text
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.placing import dequantize_layers
from quantcore.quantizers.weight import WeightQuantizer

if TYPE_CHECKING:
    from quantcore.calibration.data import Calibration

logger = logging.getLogger(__name__)


def quantize(model: nn.Module, config: Any, calibration: Any = None, **settings: Any) -> nn.Module:
    """Quantize the linear layers of a model in place and return it.

    config: a config, a dict as found in config.json, or a method's name. calibration: for methods that calibrate:
    texts, token ids, model inputs, or a `quantcore.Calibration` of them. settings: fields of that class, such as
    tokenizer=, samples= and seqlen=. Peak memory is the model plus one quantized layer and a few tiles; with
    calibration, plus the activations and statistics of one block.
    Raises ValueError, and leaves the model as it was, when a weight holds NaN or inf or reaches beyond its format, a
    shape does not fit, the model is quantized already, it has no layer to quantize, or calibration data is missing, too
    much, or unfit. An error that comes later says so where some layers are quantized by then.
    """
    if next(quantized_modules(model), None) is not None:
        raise ValueError(f"{type(model).__name__} is quantized already; quantcore.dequantize it first")
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    if not isinstance(quantizer, WeightQuantizer):
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize a model")
    data = calibration_for(quantizer, calibration, settings)
    with _no_half_in_silence(model):
        if data is not None:
            assert isinstance(quantizer, CalibratedQuantizer)
            return quantizer.calibrate_model(model, data)
        return quantizer.quantize_model(model)


@contextlib.contextmanager
def _no_half_in_silence(model: nn.Module) -> Iterator[None]:
    """A block that quantizes a model; what ends it in the middle is told with what it leaves behind.

    The float weights of finished layers are gone, for nothing keeps a second copy of the model. A ValueError says so
    itself, what else was raised stays as it is, and the log says so.
    """
    try:
        yield
    except BaseException as error:
        done = [name for name, _ in quantized_modules(model)]
        if not done:
            raise
        count = f"{len(done)} layers are" if len(done) > 1 else "1 layer is"
        half = (
            f"{type(model).__name__} is left half done: {count} quantized already, up to {done[-1]}, "
            "and the others are float; load the float model anew before you quantize again"
        )
        if isinstance(error, ValueError):
            raise with_text(error, f"{error}\n{half}") from error
        logger.error("%s", half)
        raise


def calibrates(quantizer: WeightQuantizer) -> bool:
    """Whether a quantizer reads calibration data for what its config asks for."""
    return isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data


def calibration_for(quantizer: WeightQuantizer, data: Any, settings: Mapping[str, Any]) -> Calibration | None:
    """The data that a quantizer calibrates with, the user's or the config's; None where it needs none.

    settings: fields of `Calibration`. Raises ValueError for data that is missing, or that the quantizer does not take.
    """
    if not isinstance(quantizer, CalibratedQuantizer) or not quantizer.needs_data:
        if data is not None or settings:
            given = ", ".join(settings) or "calibration data"
            raise ValueError(f"{quantizer._method()} takes no {given}; leave it out")
        return None
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

    dtype: of the weights; None gives each its layer's own, that of the model's floats. Raises ValueError for a model
    without quantized layers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        dequantized: nn.Module = quantizer.dequantize(model, dtype)
        return dequantized
    if next(quantized_modules(model), None) is None:
        raise ValueError(f"{type(model).__name__} is not quantized by quantcore; there is nothing to dequantize")
    return dequantize_layers(model, dtype)  # layers put in one by one, or left by a quantization that was cut short
