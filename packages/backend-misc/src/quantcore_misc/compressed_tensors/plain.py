"""Weights whose codes are stored one in an element: int8, float8, and floats that stand for their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Codes, TensorSpec, WeightFormat, minifloat
from quantcore_misc.compressed_tensors.weight import FLOATS, CompressedWeight, UnpackedWeight, has_dtype


@dataclass(frozen=True)
class IntegerWeight(CompressedWeight):
    """Formats int-quantized and naive-quantized: codes of up to 8 bits in int8."""

    rows_in: ClassVar[str | None] = "weight"

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", torch.int8)


@dataclass(frozen=True)
class FloatWeight(CompressedWeight):
    """Formats float-quantized, naive-quantized and mxfp8-quantized: codes in float8."""

    rows_in: ClassVar[str | None] = "weight"

    @property
    def layout(self) -> Codes:
        return Codes(dtype="float8_e4m3fn")

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", torch.float8_e4m3fn)


@dataclass(frozen=True)
class FakeWeight(UnpackedWeight):
    """Format dense, of checkpoints that are calibrated or frozen: float weights, and the scales by which they round.

    dtype: of the weight. Dequantizing rounds the weight to its codes and back; where that was done before saving,
    nothing changes.
    """

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", *FLOATS) and "weight_scale" in tensors

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", self.torch_dtype, tuple(shape)),)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        return {}  # the weight itself stands in their place

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        assert self.scaling is not None
        scale = self.grid_format.scale.load(tensors["weight_scale"], self.grid_format.grid(shape))
        zero = self.read_scales(tensors, shape)[1]
        codes = self.scaling.encode(tensors["weight"], scale, zero, tensors.get("weight_global_scale"))
        return minifloat.unpack_fp4(codes) if self.scaling.element == "e2m1" else codes

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        weight = weight.to(self.torch_dtype)
        tensors = {"weight": weight, **super().quantize_under(weight, global_scale)}
        return {**tensors, "weight": self.dequantize(tensors, tuple(weight.shape), weight.dtype)}

    @property
    def own_dtype(self) -> torch.dtype:
        return self.torch_dtype


def codes_of(weight_format: WeightFormat) -> str | None:
    """What one code of the weight is, as `product_kernels` asks."""
    if not isinstance(weight_format, IntegerWeight | FloatWeight) or weight_format.scaling is None:
        return None
    scaling = weight_format.scaling
    if scaling.columns or scaling.rows > 1 or weight_format.has_zero:
        return None
    if isinstance(weight_format, IntegerWeight):
        return "int8"
    return "float8" if scaling.element == "e4m3" else None
