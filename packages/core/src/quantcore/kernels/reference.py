"""The reference kernel: what the format itself says, in plain torch. Serves every format on every device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantcore.formats.base import WeightFormat


def linear(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
) -> Tensor:
    """x @ W.T + bias as the format defines it. x: [..., K]; bias: [N]."""
    shape = (out_features, x.shape[-1])
    return weight_format.linear(x, _named(weight_format, operands, shape), bias, shape)


def linear_input_grad(
    grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int
) -> Tensor:
    """grad @ W, the gradient for x of `linear`. grad: [..., N]; W is dequantized to its own dtype, then cast."""
    shape = (grad.shape[-1], in_features)
    weight = weight_format.dequantize(_named(weight_format, operands, shape), shape)
    return grad @ weight.to(grad.dtype)


def _named(weight_format: WeightFormat, operands: Sequence[Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    return dict(zip(weight_format.operand_names(shape), operands, strict=True))
