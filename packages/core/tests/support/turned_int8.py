"""The tiny format for weights that are stored under an input transform."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tiny_int8 import TinyInt8
from torch import Tensor

from quantcore.formats.base import TensorSpec
from quantcore.formats.transforms import Transform


@dataclass(frozen=True)
class TurnedInt8(TinyInt8):
    """The tiny format for a weight that is stored under a transform."""

    transform: Transform | None = None

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        own = () if self.transform is None else self.transform.specs(shape[1])
        return super().tensor_specs(shape) + own

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return super().quantize(weight) if self.transform is None else self.quantize_transformed(weight)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return self.dequantize_transformed(tensors, shape, dtype)
        return super().dequantize(tensors, shape, dtype)
