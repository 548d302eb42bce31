"""Weights that are stored as floats: left as they are, or to be rounded under the scales that stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import OnGrid, TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_misc.quark.layer import QuarkLayer
from quantcore_misc.quark.scaling import encode_weight
from quantcore_misc.quark.weight import QuarkWeight


@dataclass(frozen=True)
class QuarkFloat(QuarkLayer):
    """The weight itself, in the model's dtype; the layer rounds activations alone."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        weight = TensorSpec("weight", float_dtype(self.dtype, "dtype"), shape)
        return (weight, *self.activation_specs())

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The weight, and scales of activations that are 1 until calibration measures them."""
        return {"weight": weight.to(float_dtype(self.dtype, "dtype"), copy=True), **self.unmeasured(weight.device)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return tensors["weight"].to(dtype or float_dtype(self.dtype, "dtype"), copy=True)


@dataclass(frozen=True)
class QuarkFake(QuarkWeight):
    """Floats, and the scales to round them under: [], [N], or [N, G], zero points likewise, one in an integer.

    Weights that are rounded already stay as they are. zero_dtype: of zero points. Only read: nothing is saved by it.
    """

    family = None

    zero_dtype: str = "int32"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        grid = self.grid_format.grid(shape)
        specs = [TensorSpec("weight", self.own_dtype, shape)]
        specs += [TensorSpec(part.name, part.torch_dtype, part.shape(grid)) for part in self._tables]
        if self.grid_format.outer is not None:
            specs.append(self.grid_format.outer.spec())
        return (*specs, *self.activation_specs())

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        found = super().read(tensors, shape)
        assert isinstance(found, QuarkFake)
        zero = tensors.get(found.name_of("weight_zero_point"))
        is_integer = zero is not None and zero.dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)
        return found if zero is None or not is_integer else found.replace(zero_dtype=dtype_name(zero.dtype))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        raise ValueError("weight_format 'fake_quantized' is read, not made; quantize with 'real_quantized'")

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        grid, weight = self.grid_format, tensors["weight"].to(self.own_dtype)
        scale, *zeros = (part.load(tensors[part.name], grid.grid(shape)) for part in self._tables)
        scale, zero = scale.float(), zeros[0] if zeros else None
        if grid.outer is not None:
            scale = scale * tensors[grid.outer.name].float()
        is_plain = self.scale == "float" and not self.has_zero  # floats are divided in their own dtype
        codes = encode_weight(weight, scale.to(weight.dtype) if is_plain else scale, zero, self)
        return grid.values(codes, scale, zero, dtype or weight.dtype)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        return None if weight is None or weight.ndim != 2 else tuple(weight.shape)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Floats are not packed, so every shape is stored."""

    @property
    def _tables(self) -> tuple[OnGrid, ...]:
        """Scales, and zero points of integers, none of them packed or transposed."""
        grid = self.grid_format
        scale = OnGrid(grid.scale.name, self.scale_dtype, grid.scale.rank)
        return (scale,) if grid.zero is None else (scale, OnGrid(grid.zero.name, self.zero_dtype, grid.zero.rank))
