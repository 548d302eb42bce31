"""Integers that stand for E4M3 codes: a weight that is rounded twice, so that it is stored in 4 bits and run in 8."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from quantcore.sdk import Outer, Parts, Scaled
from quantcore_misc.quark.scaling import quantize_weight
from quantcore_misc.quark.weight import QuarkWeight


@dataclass(frozen=True)
class ProgressiveWeight(QuarkWeight):
    """w = (code - zero) * scale_2 * scale, where (code - zero) * scale_2 is in units of E4M3 codes of the tensor."""

    def describe_grid(self) -> Scaled:
        grid = super().describe_grid()
        assert grid.zero is not None
        return dataclasses.replace(
            grid,
            scale=dataclasses.replace(grid.scale, name="weight_scale_2"),
            zero=dataclasses.replace(grid.zero, name="weight_zero_point_2"),
            outer=Outer("weight_scale", self.scale_dtype),
        )

    def round_weight(self, weight: Tensor) -> Parts:
        outer = quantize_weight(weight.to(self.own_dtype), QuarkWeight(dtype=self.dtype))
        return super().round_weight(outer.codes.to(self.own_dtype))._replace(outer=outer.scale.reshape(()))
