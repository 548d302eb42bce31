"""A method without a fault: uint8 codes around 128 and one scale a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from quantcore import QuantizationConfigMixin, TensorSpec, WeightFormat, WeightQuantizer, option
from quantcore.formats.base import dtype_name, float_dtype
from quantcore.formats.families import Affine, Family, Grouping

CENTRE = 128


@dataclass(eq=False, repr=False)
class SoundConfig(QuantizationConfigMixin):
    quant_method = "sound"

    limit: int = option(127, minimum=1, maximum=127)
    modules_to_not_convert: list[str] | None = option(None)


@dataclass(frozen=True)
class Sound(WeightFormat):
    """w = (code - 128) * scale, in float32."""

    family: ClassVar[str | None] = "affine"

    dtype: str = "float32"
    limit: int = 127

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        scale = TensorSpec("weight.scale", torch.float32, (shape[0],))
        return TensorSpec("weight", torch.uint8, tuple(shape)), scale

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scale = self.scale(weight.float())
        codes = (weight.float() / scale[:, None]).round() + CENTRE
        return {"weight": codes.to(torch.uint8), "weight.scale": scale}

    def scale(self, weight: Tensor) -> Tensor:
        """One scale a row, float32 [N]."""
        return (weight.abs().amax(1) / self.limit).clamp(min=1e-30)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values = (tensors["weight"].float() - CENTRE) * tensors["weight.scale"][:, None]
        return values.to(dtype or float_dtype(self.dtype, "dtype"))

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        scale = tensors["weight.scale"]
        return Affine(tensors["weight"], scale, torch.full_like(scale, CENTRE), Grouping(shape[1]), bits=8)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        assert isinstance(family, Affine)
        return {"weight": family.codes, "weight.scale": family.scales()}


class SoundQuantizer(WeightQuantizer):
    """Gives every layer the format that the class names."""

    format_class: type[Sound] = Sound

    def format_for(self, name: str, module: nn.Module) -> Sound:
        return self.format_class(dtype=dtype_name(module.weight.dtype))
