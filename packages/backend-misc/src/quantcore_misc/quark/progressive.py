"""Integers that stand for E4M3 codes: a weight that is rounded twice, so that it is stored in 4 bits and run in 8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantcore.formats.base import TensorSpec, float_dtype
from quantcore_misc.quark.scaling import quantize_weight
from quantcore_misc.quark.weight import QuarkWeight

_OUTER = "weight_scale"
_INNER = {_OUTER: "weight_scale_2", "weight_zero_point": "weight_zero_point_2"}


@dataclass(frozen=True)
class ProgressiveWeight(QuarkWeight):
    """w = (code - zero) * scale_2 * scale, where (code - zero) * scale_2 is in units of E4M3 codes of the tensor."""

    def name_of(self, name: str) -> str:
        return super().name_of(_INNER.get(name, name))

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        outer = TensorSpec(_OUTER, float_dtype(self.scale_dtype, "scale_dtype"), ())
        return (*super().tensor_specs(shape), outer)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        dtype = float_dtype(self.dtype, "dtype")
        outer = quantize_weight(weight.to(dtype), QuarkWeight(dtype=self.dtype))
        stored = super().quantize(outer.codes.to(dtype))
        return {**stored, _OUTER: outer.scale.to(float_dtype(self.scale_dtype, "scale_dtype"))}

    def scales_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return super().scales_of(tensors) * tensors[_OUTER].float()
