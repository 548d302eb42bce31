"""How one routed expert of DeepSeek-V4 is stored: E2M1 codes, a power of two for each 32 columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import TensorSpec, WeightFormat, float_dtype
from quantcore.formats.blocks import block_abs_max, quantize_blocks, scale_rows_
from quantcore.formats.minifloat import E2M1, decode_fp4, e8m0_values, pack_fp4, power_of_two_above
from quantcore.formats.pieces import linear_rows, row_pieces
from quantcore_fp8.names import SCALE_NAMES

GROUP = 32
_LEAST_AMAX = 1e-4  # of DeepGEMM's casts
_NEGATIVE_ZERO = 8


@dataclass(frozen=True)
class Fp4Expert(WeightFormat):
    """Two E2M1 codes a byte [N, K/2], the even column low; a value is code * 2**(b - 127) of its group's byte.

    scale: suffix of the scales, float8_e8m0fnu [N, K/32]. activation: how the layer rounds its input. dtype: of the
    weight that was quantized. Quantizing takes ties toward zero and stores no negative zero, as DeepGEMM's cast does.
    """

    activations: ClassVar[tuple[str, ...]] = ("activation",)

    scale: str = "weight_scale_inv"
    activation: Activation | None = None
    dtype: str = "bfloat16"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        N, K = shape
        return (
            TensorSpec("weight", torch.int8, (N, K // 2), along_n=(0, 1), along_k=(1, 2)),
            TensorSpec(self.scale, torch.float8_e8m0fnu, (N, K // GROUP), along_n=(0, 1), along_k=(1, GROUP)),
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[-1] % GROUP:
            raise ValueError(f"in_features {shape[-1]} is not a multiple of {GROUP}; use expert_dtype 'fp8'")

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        amax = block_abs_max(weight, (1, GROUP)).float()
        exponents = power_of_two_above(amax.clamp(min=_LEAST_AMAX) / E2M1.maximum).clamp_(1, 254).to(torch.uint8)
        factor = e8m0_values(exponents).reciprocal_()
        codes = quantize_blocks(weight, factor, (1, GROUP), E2M1, ties="zero")
        codes.masked_fill_(codes == _NEGATIVE_ZERO, 0)
        return {"weight": pack_fp4(codes).view(torch.int8), self.scale: exponents.view(torch.float8_e8m0fnu)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        weight = torch.empty(shape, dtype=dtype or float_dtype(self.dtype, "dtype"), device=tensors["weight"].device)
        scale = e8m0_values(tensors[self.scale])
        for rows in row_pieces(shape):
            weight[rows] = _values(tensors["weight"], scale, rows)
        return weight

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """As the layers of E4M3: the input rounded, the product in float32, the bias after one rounding."""
        rounding, scale = self.activation, e8m0_values(operands[self.scale])
        if rounding is None:
            return super().linear(x, operands, bias, shape)
        inputs = rounding.dequantize(rounding.quantize(x), torch.float32)
        y = linear_rows(inputs, lambda rows: _values(operands["weight"], scale, rows), shape, None, x.dtype)
        return y if bias is None else y.add_(bias)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        return x if side == "output" or self.activation is None else self.activation.fake_quantize(x)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format under the name that a file gives its scales."""
        return self.replace(scale=next((name for name in SCALE_NAMES if name in tensors), self.scale))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        return None if weight is None or weight.ndim != 2 else (weight.shape[0], 2 * weight.shape[1])


def _values(packed: Tensor, scale: Tensor, rows: slice) -> Tensor:
    """The given rows of the weight, float32."""
    return scale_rows_(decode_fp4(packed[rows]), scale, (1, GROUP), rows)
