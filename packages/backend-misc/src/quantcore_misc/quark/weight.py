"""How one weight of Quark is stored: codes, scales and zero points.

Source: the exports of AMD Quark 0.13; OCP Microscaling Formats 1.0 for scales of powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import GridLayer, Outer, Parts, Scale, Scaled, WeightFormat, Zero, float_dtype
from quantcore_misc.quark.codes import INTEGERS, element_of, layout_of
from quantcore_misc.quark.layer import SECONDS, QuarkLayer
from quantcore_misc.quark.scaling import quantize_weight

_SCALE_DTYPES = {"e8m0": "uint8", "e5m3": "uint8", "e4m3": "float8_e4m3fn"}
_RANKS = {"tensor": 0, "channel": 1}


@dataclass(frozen=True)
class QuarkWeight(QuarkLayer, GridLayer):
    """w = (code - zero) * scale in float32, rounded once.

    element, strategy, group_size, block_rows, is_symmetric, scale, mode: as in `TensorQuant`. is_reordered: the order
    of codes in a word.
    """

    element: str = "e4m3"
    strategy: str = "tensor"
    group_size: int = 0
    block_rows: int = 0
    is_symmetric: bool = True
    scale: str = "float"
    mode: str = "even"
    is_reordered: bool = True

    def describe_grid(self) -> Scaled:
        layout = layout_of(self.element, self.strategy, self.is_reordered)
        rank, dtype = _RANKS.get(self.strategy, 2), _SCALE_DTYPES.get(self.scale, self.scale_dtype)
        zero = None
        if self.has_zero:
            is_packed = layout.packing != "single" and self.strategy != "tensor"
            zero = Zero(self.name_of("weight_zero_point"), layout.dtype, rank, layout.transposed, is_packed=is_packed)
        outer = Outer(SECONDS["weight"], self.second_dtype("weight")) if self.scale == "e4m3" else None
        kind = self.scale if self.scale != "float" else ""
        return Scaled(
            element_of(self.element),
            (0, 0) if self.strategy == "tensor" else (self.block_rows or 1, self.group_size),
            layout,
            Scale(self.name_of("weight_scale"), dtype, rank, layout.transposed, kind),
            zero,
            outer,
        )

    @property
    def own_dtype(self) -> torch.dtype:
        return float_dtype(self.dtype, "dtype")

    @property
    def has_zero(self) -> bool:
        """Integers are stored with zero points, symmetric ones too."""
        return self.element in INTEGERS

    def check_shape(self, shape: tuple[int, ...]) -> None:
        layout = self.grid_format.layout.layout(self.grid_format.element.bits)
        codes = 1 if layout is None else layout.codes
        packs_rows = self.has_zero and self.strategy != "tensor"  # zero points of rows at least
        multiples = codes if packs_rows else 1, 1 if self.has_zero and self.strategy == "group" else codes
        for name, size, multiple in zip(("out_features", "in_features"), shape, multiples, strict=True):
            if size % multiple:
                raise ValueError(
                    f"{name} {size} is not a multiple of {multiple}, as {self.element} by {self.strategy} needs; "
                    "add the layer to exclude"
                )
        if self.strategy == "group" and shape[1] % self.group_size:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of group_size {self.group_size}; use another, or add the "
                "layer to exclude"
            )

    def round_weight(self, weight: Tensor) -> Parts:
        """Codes and scales of the weight in the model's dtype."""
        parts = quantize_weight(weight.to(self.own_dtype), self)
        is_float = self.scale == "float"
        return parts._replace(scale=parts.scale.to(self.grid_format.scale.torch_dtype)) if is_float else parts


def codes_of(weight_format: WeightFormat) -> str | None:
    """What one code of the weight is, as `product_kernels` asks; symmetric integers have zero points of 0."""
    if type(weight_format) is not QuarkWeight or weight_format.strategy not in ("tensor", "channel"):
        return None
    if weight_format.element == "int8":
        return "int8" if weight_format.is_symmetric else None
    return "float8" if weight_format.element == "e4m3" and weight_format.scale == "float" else None
