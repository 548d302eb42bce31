"""Which format each layer gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.nn.dense import DenseLinear
from quantcore.nn.linear import QuantizedLinear
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.quantizers.weight import dequantize_layers
from quantcore_gptq.gptq.config import GPTQConfig, LayerSettings
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.marlin import Marlin
from quantcore_gptq.models import float_dtype_of


class GptqQuantizer(CalibratedQuantizer):
    """Loads and makes GPTQ models."""

    quantization_config: GPTQConfig

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        settings = self.quantization_config.for_layer(name)
        return None if settings is None else self.format_of(settings)

    def format_of(self, settings: LayerSettings) -> WeightFormat:
        """The format of a layer with these settings. Raises ValueError for a layout that is not read."""
        config = self.quantization_config
        if config.format == "bitblas":
            raise ValueError(
                "GPTQConfig.format: 'bitblas' is a layout of one GPU kernel; convert to 'gptq' with gptqmodel"
            )
        if config.format == "marlin":
            return _marlin(settings)
        planar = config.is_planar
        zeros = "v2" if planar or config.format == "gptq_v2" else "v1" if config.is_autogptq else "v1-words"
        return Gptq(
            bits=settings.bits,
            group_size=settings.group_size,
            sym=settings.sym,
            zeros=zeros,
            planar=planar,
            word=config.pack_dtype or "int32",
        )

    def _empty_layer(
        self, name: str, module: nn.Module, dense: DenseLinear, stored: Mapping[str, Tensor]
    ) -> QuantizedLinear:
        if dense.bias is None and "bias" in stored:  # AutoGPTQ wrote a bias, of zeros, where the model has none
            dense = dataclasses.replace(dense, bias=stored["bias"])
        return super()._empty_layer(name, module, dense, stored)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_layers(model, dtype or float_dtype_of(model))


def _marlin(settings: LayerSettings) -> Marlin:
    if settings.bits != 4 or not settings.sym:
        raise ValueError("GPTQConfig.format: 'marlin' holds 4 bits with sym=True alone; use 'gptq'")
    return Marlin(group_size=settings.group_size)
