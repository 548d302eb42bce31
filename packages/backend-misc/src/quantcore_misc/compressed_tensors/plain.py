"""Weights whose codes are stored one in an element: int8, float8, and floats that stand for their codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.formats.families import Affine, Family
from quantcore_misc.compressed_tensors.lowering import lower_integers, raise_integers
from quantcore_misc.compressed_tensors.weight import FLOATS, CompressedWeight, has_dtype


@dataclass(frozen=True)
class IntegerWeight(CompressedWeight):
    """Formats int-quantized and naive-quantized: codes of up to 8 bits in int8."""

    family: ClassVar[str | None] = "affine"
    rows_in: ClassVar[str | None] = "weight"

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", torch.int8)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (self.code_spec("weight", torch.int8, tuple(shape)),)

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return tensors["weight"]

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        return lower_integers(self, tensors, shape)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        return raise_integers(self, family)


@dataclass(frozen=True)
class FloatWeight(CompressedWeight):
    """Formats float-quantized, naive-quantized and mxfp8-quantized: codes in float8."""

    rows_in: ClassVar[str | None] = "weight"

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", torch.float8_e4m3fn)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (self.code_spec("weight", torch.float8_e4m3fn, tuple(shape)),)

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        return tensors["weight"]


@dataclass(frozen=True)
class FakeWeight(CompressedWeight):
    """Format dense, of checkpoints that are calibrated or frozen: float weights, and the scales by which they round.

    dtype: of the weight. Dequantizing rounds the weight to its codes and back; where that was done before saving,
    nothing changes.
    """

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return has_dtype(tensors, "weight", *FLOATS) and "weight_scale" in tensors

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (self.code_spec("weight", self.torch_dtype, tuple(shape)),)

    def quantize_under(self, weight: Tensor, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        assert self.scaling is not None
        weight = weight.to(self.torch_dtype)
        codes, scale, zero, global_scale = self.scaling.quantize(weight, global_scale)
        rounded = self.scaling.dequantize(codes, scale, zero, global_scale, weight.dtype)
        tensors = {"weight": rounded, **self.store_scales(scale, zero, tuple(weight.shape))}
        if global_scale is not None:
            tensors["weight_global_scale"] = global_scale
        return tensors

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        assert self.scaling is not None
        weight, global_scale = tensors["weight"], tensors.get("weight_global_scale")
        scale, zero = self.read_scales(tensors, shape)
        codes = self.scaling.encode(weight, scale, zero, global_scale)
        return self.scaling.dequantize(codes, scale, zero, global_scale, dtype or weight.dtype)


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
