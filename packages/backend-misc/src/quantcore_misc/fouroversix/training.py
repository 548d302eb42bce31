"""Layers that are trained in 4 bits: weights, inputs and gradients are rounded before every product.

Source: NVIDIA 2025, Pretraining large language models with NVFP4 (arXiv:2509.25149), section 4; Cook et al. 2025, Four
Over Six (arXiv:2512.02010).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantcore.sdk import OnlineLinear, transforms
from quantcore_misc.fouroversix.rules import Rounding
from quantcore_misc.masters import MasterWeight

_ROTATED = 16  # tokens that are rotated together
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_ROTATION = transforms.Hadamard(_ROTATED, "signs")


class FourOverSixLinear(OnlineLinear):
    """A layer over a float master weight, whose gradients are products of rounded matrices, too.

    inputs, gradients: how they are rounded. The gradient of the input is that of the rounded weight; the gradient of
    the weight is taken of gradients and inputs that are rotated along the tokens first.
    """

    def __init__(self, linear: nn.Linear, weight_format: MasterWeight, inputs: Rounding, gradients: Rounding) -> None:
        super().__init__(linear, weight_format)
        self.inputs, self.gradients = inputs, gradients

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FourOverSixLinear) -> Tensor:
        shape = (layer.out_features, layer.in_features)
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        return layer.format.linear(x, {"weight": weight}, bias, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        rows, tokens = grad.reshape(-1, grad.shape[-1]).float(), x.reshape(-1, x.shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            rounded = layer.format.dequantize({"weight": weight}, tuple(weight.shape), torch.float32)
            of_x = (layer.gradients.fake_quantize(rows) @ rounded).view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            turned = layer.gradients.fake_quantize(rotated(rows.t()))
            of_weight = (turned @ layer.inputs.fake_quantize(rotated(tokens.t())).t()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


def rotated(matrix: Tensor) -> Tensor:
    """A matrix [R, T] whose columns are rotated in blocks of 16, filled up with zeros to whole ones, in its dtype."""
    padded = functional.pad(matrix, (0, -matrix.shape[1] % _ROTATED))
    signs = torch.tensor(_SIGNS, dtype=torch.float32, device=matrix.device).repeat(padded.shape[1] // _ROTATED)
    return _ROTATION.apply(padded, {"signs": signs})
