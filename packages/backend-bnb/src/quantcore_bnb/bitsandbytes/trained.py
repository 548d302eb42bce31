"""LLM.int8() over float weights that are trained: they are rounded anew in each forward pass, and saved as they are.

Source: Dettmers et al. 2022, LLM.int8() (arXiv:2208.07339); what bitsandbytes calls has_fp16_weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantcore_bnb.bitsandbytes import int8


class Int8TrainedLinear(nn.Linear):
    """A linear layer that multiplies as an 8-bit one, over the float weight of another layer.

    threshold: as for `int8.linear`. Differentiable in input, weight and bias: the weight's gradient is that of the
    float product, the input's that of the rounded weight. Raises ValueError naming the row for a magnitude above 65504.
    """

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Int8Product.apply(x, self.weight, self.bias, self.threshold)
        return y

    def to_linear(self) -> nn.Linear:
        """The float layer again, over the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        codes, row_max = int8.quantize_rows(weight)
        ctx.save_for_backward(x, codes, row_max)
        return int8.linear(x, codes, row_max, bias, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, row_max = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = (
            (rows @ int8.dequantize_rows(codes, row_max, grad.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        )
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None
