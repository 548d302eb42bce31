"""Float weights that each forward rounds: what several methods train, and store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, dtype_name, float_dtype

WEIGHT = "weight"


@dataclass(frozen=True)
class MasterWeight(WeightFormat):
    """A float weight [N, K] of float_type, which is rounded, as is the input, as another format does."""

    rounded: WeightFormat
    float_type: str = "bfloat16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        dtype = float_dtype(self.float_type, "float_type")
        weight = TensorSpec(WEIGHT, dtype, tuple(shape), along_n=(0, 1), along_k=(1, 1))
        return (weight, *self.beside(shape))

    def beside(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """What a layer stores besides its weight."""
        return ()

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        own = weight.to(float_dtype(self.float_type, "float_type"), copy=True).contiguous()
        made = self.rounded.quantize(weight) if self.beside(tuple(weight.shape)) else {}
        return {WEIGHT: own, **{spec.name: made[spec.name] for spec in self.beside(tuple(weight.shape))}}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.rounded.dequantize(self._operands(tensors, shape), shape, dtype or tensors[WEIGHT].dtype)

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rounded, transform = self._operands(operands, shape), self.rounded.transform
        turned = x if transform is None else transform.apply(x, rounded)
        return self.rounded.untransformed().linear(turned, rounded, bias, shape).to(x.dtype)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        transform = self.rounded.transform if side == "input" else None
        if transform is None:
            return self.rounded.round_activation(side, x, operands)
        found = self.rounded.untransformed().round_activation(side, transform.apply(x, operands), operands)
        return transform.transpose(found, operands).to(x.dtype)

    @property
    def rounds_rows_apart(self) -> bool:
        return self.rounded.rounds_rows_apart

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtype of the stored weight."""
        weight = tensors.get(WEIGHT)
        is_float = weight is not None and weight.is_floating_point()
        return self.replace(float_type=dtype_name(weight.dtype)) if weight is not None and is_float else self

    def _operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What kernels read of the weight rounded anew."""
        return self.rounded.operands(self.rounded.requantize(tensors[WEIGHT], tensors), shape)
