"""The reference kernel: what the format itself says, in plain torch. Serves every format on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    """grad @ W, the gradient for x of `linear`. grad: [..., N]; W is dequantized to its dtype."""
    shape = (grad.shape[-1], in_features)
    return grad @ weight_format.dequantize(_named(weight_format, operands, shape), shape, grad.dtype)


def grouped_linear(
    x: Tensor, ends: Tensor, experts: Sequence[Sequence[Tensor]], weight_format: WeightFormat, out_features: int
) -> Tensor:
    """Each row of x [M, K] times the weight of its expert: expert e has the rows from ends[e - 1] to ends[e]."""
    parts = zip(rows_of_experts(x, ends), experts, strict=True)
    return torch.cat([linear(rows, operands, None, weight_format, out_features) for rows, operands in parts])


def rows_of_experts(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each expert, as `grouped_linear` says: views of x."""
    stops = ends.tolist()
    return [x[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def _named(weight_format: WeightFormat, operands: Sequence[Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    return dict(zip(weight_format.operand_names(shape), operands, strict=True))
