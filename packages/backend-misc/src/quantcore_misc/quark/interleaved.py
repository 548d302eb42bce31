"""Blocks of 4-bit floats after their scales, as the old data type "mx" stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec
from quantcore_misc.quark.weight import QuarkWeight

_BYTES = 17  # of 32 values: an exponent in two's complement, and 16 bytes of two codes
_BIAS = 127  # of the exponents that `QuarkWeight` reads


@dataclass(frozen=True)
class InterleavedWeight(QuarkWeight):
    """MXFP4 in one tensor, uint8 [N, K / 32 * 17]. Only read: nothing is saved by it."""

    family = None

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        stored = (shape[0], shape[1] // self.group_size * _BYTES)
        return (TensorSpec("weight", torch.uint8, stored, along_n=(0, 1)), *self.activation_specs())

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        raise ValueError("dtype 'mx' is read, not made; quantize to 'fp4' with scale_format 'e8m0'")

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        blocks = tensors["weight"].unflatten(1, (-1, _BYTES))
        parts = {"weight": blocks[:, :, 1:].flatten(1), "weight_scale": blocks[:, :, 0] + _BIAS}
        return self.grid_format.dequantize(parts, shape, dtype or self.own_dtype)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2:
            return None
        return weight.shape[0], weight.shape[1] // _BYTES * self.group_size
