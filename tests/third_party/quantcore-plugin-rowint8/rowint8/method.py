"""Config, format and quantizer of the method."""

from dataclasses import dataclass

import torch

import quantcore


@dataclass(eq=False, repr=False)
class RowInt8Config(quantcore.QuantizationConfigMixin):
    quant_method = "rowint8"
    modules_to_not_convert: list[str] | None = quantcore.option(None, help="modules that stay float")


@dataclass(frozen=True)
class RowInt8(quantcore.WeightFormat):
    def tensor_specs(self, shape):
        scale = quantcore.TensorSpec("weight_scale", torch.float32, (shape[0], 1))
        return (quantcore.TensorSpec("weight", torch.int8, tuple(shape)), scale)

    def quantize(self, weight):
        scale = (weight.abs().amax(1, keepdim=True).float() / 127).clamp(min=1e-30)
        return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}

    def dequantize(self, tensors, shape, dtype=None):
        return (tensors["weight"] * tensors["weight_scale"]).to(dtype or torch.float32)


class RowInt8Quantizer(quantcore.WeightQuantizer):
    def format_for(self, name, module):
        return RowInt8()
