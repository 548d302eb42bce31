"""A linear layer over a float weight that is quantized anew in each forward pass: training that knows of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.formats.interning import format_from_key, format_key
from quantcore.kernels import ops


class OnlineLinear(nn.Linear):
    """A layer that multiplies as a quantized one, over the float master weight of another layer.

    besides: what a quantized layer stores that is not of the weight (an input scale, a rotation), by suffix; it is kept
    as buffers. Differentiable in input, weight and bias: the gradient of the input is that of the quantized weight, the
    gradient of the weight that of the product with the input as it is rounded, for rounding is taken to change nothing
    (straight-through).
    Raises what the format raises for a weight that it cannot quantize.
    """

    def __init__(
        self, linear: nn.Linear, weight_format: WeightFormat, besides: Mapping[str, Tensor] | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.format = weight_format
        self.besides = {suffix: suffix.replace(".", "_") for suffix in besides or {}}  # -> names of buffers
        for suffix, tensor in (besides or {}).items():
            self.register_buffer(self.besides[suffix], tensor)

    def quantize(self) -> dict[str, Tensor]:
        """The tensors that a quantized layer of this weight stores."""
        kept = {suffix: self.get_buffer(name) for suffix, name in self.besides.items()}
        return self.format.requantize(self.weight.detach(), kept)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        operands = list(self.format.operands(self.quantize(), shape).values())
        y: Tensor = _Product.apply(x, self.weight, self.bias, format_key(self.format), *operands)  # type: ignore[no-untyped-call]
        return y

    def to_linear(self) -> nn.Linear:
        """The float layer again, over the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, key: str, *operands: Tensor) -> Tensor:
        ctx.key, ctx.bias_dtype = key, None if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(x, *operands)
        y: Tensor = ops.linear(x, list(operands), bias, key, weight.shape[0])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *operands = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.quantcore.linear_input_grad(grad, operands, ctx.key, x.shape[-1])
        if ctx.needs_input_grad[1]:
            shape = (grad.shape[-1], x.shape[-1])
            weight_format = format_from_key(ctx.key)
            named = dict(zip(weight_format.operand_names(shape), operands, strict=True))
            inputs = weight_format.round_activation("input", x, named)  # what the weight was multiplied by
            of_weight = (rows.t() @ inputs.reshape(-1, x.shape[-1]).to(rows.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.bias_dtype)
        return (of_x, of_weight, of_bias, None, *([None] * len(operands)))
