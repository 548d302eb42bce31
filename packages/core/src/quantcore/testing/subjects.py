"""What the conformance suite runs on: example configs, the layers and formats they give, and a small model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.formats.base import QuantizedWeight, WeightFormat
from quantcore.nn.module import QuantizedModule
from quantcore.plugins.backend import Backend
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from quantcore.quantizers.weight import WeightQuantizer

LAYER_NAME = "model.layers.0.self_attn.q_proj"
REGULAR_SHAPE = (128, 256)  # fits every published group and block size, and is large enough to measure an error on


@dataclass(frozen=True, eq=False)
class Example:
    """One declared example config of a method."""

    backend: Backend
    config_dict: Mapping[str, Any]

    def config(self) -> QuantizationConfigMixin:
        return AutoQuantizationConfig.from_dict(self.config_dict)

    def quantizer(self) -> WeightQuantizer:
        """The quantizer of the config, for float weights where the method needs no calibration data."""
        quantizer = AutoHfQuantizer.from_config(self.config(), pre_quantized=self.backend.needs_calibration)
        assert isinstance(quantizer, WeightQuantizer), f"{type(quantizer).__name__} is no WeightQuantizer"
        return quantizer

    def weight_format(self, linear: nn.Module) -> WeightFormat:
        """The format that the config gives a linear layer."""
        weight_format = self.quantizer().format_for(LAYER_NAME, linear)
        assert weight_format is not None, f"the example config leaves {LAYER_NAME} float; use one that quantizes it"
        return weight_format

    def quantize(self, linear: nn.Linear) -> QuantizedWeight:
        """The layer's weight, stored. Skips where a format that only reads belongs to a method that needs calibration."""
        weight = linear.weight.detach()
        weight_format = self.weight_format(linear)
        with self._only_reading_is_declared():
            return QuantizedWeight(weight_format, weight_format.quantize(weight), tuple(weight.shape))

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """The model, quantized in place.

        Where the method needs calibration data, its format rounds in place of the solver: what is stored is worse, and
        all that is done with it the same.
        """
        if not self.backend.needs_calibration:
            return quantcore.quantize(model, dict(self.config_dict))
        with self._only_reading_is_declared():
            return self.quantizer().quantize_model(model)

    def layer(self, linear: nn.Linear) -> QuantizedModule:
        """The module that stands in a quantized model in place of a linear layer of the name LAYER_NAME."""
        model = self.quantize_model(_wrap(linear))
        layer = model.get_submodule(LAYER_NAME)
        assert isinstance(layer, QuantizedModule), f"a quantized layer is a {type(layer).__name__}, not a QuantizedModule"
        return layer

    def _only_reading_is_declared(self) -> _SkipReaders:
        return _SkipReaders(self.backend)


@dataclass(frozen=True)
class _SkipReaders:
    """A block that may raise NotImplementedError, and then skips the test, if the method declares needs_calibration."""

    backend: Backend

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NotImplementedError) and self.backend.needs_calibration:
            pytest.skip(f"{self.backend.method} declares needs_calibration, and its format only reads: {error}")
