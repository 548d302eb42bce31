"""Weights that are stored as floats: left as they are, or to be rounded under the scales that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_misc.quark.layer import SECONDS, SIDES, QuarkLayer
from quantcore_misc.quark.scaling import dequantize_codes, encode_weight, values_of_codes
from quantcore_misc.quark.weight import QuarkWeight


@dataclass(frozen=True)
class FloatWeight(QuarkLayer):
    """The weight itself, in the model's dtype; the layer rounds activations alone."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        weight = TensorSpec("weight", float_dtype(self.dtype, "dtype"), shape)
        return (weight, *self.activation_specs(*SIDES))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight, and scales of activations that are 1 until calibration measures them."""
        return {"weight": weight.to(float_dtype(self.dtype, "dtype"), copy=True), **self.unmeasured(weight.device)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return tensors["weight"].to(dtype or float_dtype(self.dtype, "dtype"), copy=True)


@dataclass(frozen=True)
class FakeWeight(QuarkWeight):
    """Floats, and the scales to round them under: [], [N], or [N, G], zero points likewise, one in an integer.

    Weights that are rounded already stay as they are. zero_dtype: of zero points. Only read: nothing is saved by it.
    """

    zero_dtype: str = "int32"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        weight = TensorSpec("weight", float_dtype(self.dtype, "dtype"), shape)
        scale = TensorSpec(
            self.name_of("weight_scale"), float_dtype(self.scale_dtype, "scale_dtype"), self._grid(shape)
        )
        specs = [weight, scale]
        if self.has_zero:
            dtype = getattr(torch, self.zero_dtype)
            specs.append(TensorSpec(self.name_of("weight_zero_point"), dtype, self._grid(shape)))
        if self.scale == "e4m3":
            specs.append(self.second_spec("weight"))
        return (*specs, *self.activation_specs(*SIDES))

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        found = super().read(tensors, shape)
        assert isinstance(found, FakeWeight)
        zero = tensors.get(found.name_of("weight_zero_point"))
        is_integer = zero is not None and zero.dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)
        return found if zero is None or not is_integer else found.replace(zero_dtype=dtype_name(zero.dtype))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        raise ValueError("weight_format 'fake_quantized' is read, not made; quantize with 'real_quantized'")

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        scale, zero = tensors[self.name_of("weight_scale")].float(), tensors.get(self.name_of("weight_zero_point"))
        if self.scale == "e4m3":
            scale = scale * tensors[SECONDS["weight"]].float()
        if self.strategy == "channel":
            scale, zero = scale[:, None], None if zero is None else zero[:, None]
        weight = tensors["weight"].to(float_dtype(self.dtype, "dtype"))
        is_plain = self.scale == "float" and not self.has_zero  # floats are divided in their own dtype
        codes = encode_weight(weight, scale.to(weight.dtype) if is_plain else scale, zero, self)
        return dequantize_codes(values_of_codes(codes, self.element), shape, scale, zero, self, dtype or weight.dtype)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        return None if weight is None or weight.ndim != 2 else tuple(weight.shape)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Floats are not packed, so every shape is stored."""

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        grid = super()._grid(shape)
        return grid[::-1] if self._is_transposed else grid
