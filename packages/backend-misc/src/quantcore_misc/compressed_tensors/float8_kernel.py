"""The product of E4M3 inputs and E4M3 weights on a GPU's units for 8-bit floats."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantcore.kernels.dispatch import REFERENCE, Kernel, Problem
from quantcore.kernels.float8 import float8_matmul, refuse_float8
from quantcore.kernels.reference import linear_input_grad
from quantcore_misc.compressed_tensors.plain import FloatWeight

_PRIORITY = REFERENCE.priority + 20


def refuse(problem: Problem) -> str | None:
    """Why products of 8-bit floats cannot serve a problem, or None."""
    weight_format = problem.weight_format
    if not isinstance(weight_format, FloatWeight) or weight_format.scaling is None:
        return "serves weights of one E4M3 code an element"
    scaling = weight_format.scaling
    if scaling.element != "e4m3" or scaling.columns or scaling.rows > 1 or weight_format.output is not None:
        return "serves E4M3 weights with one scale, or one for each row, and outputs that are not rounded"
    return refuse_float8(problem, weight_format.input)


def linear(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: FloatWeight, out_features: int
) -> Tensor:
    """x [..., K] bfloat16, rounded to E4M3, times the codes, under the scales of both, plus bias [N]."""
    assert weight_format.input is not None
    rounding, rows, shape = weight_format.input, x.reshape(-1, x.shape[-1]), (out_features, x.shape[-1])
    named = dict(zip(weight_format.operand_names(shape), operands, strict=True))
    stored = named["input_scale"].to(x.dtype) if rounding.is_static else None
    quantized = rounding.quantize(rows.float() if weight_format.is_optimized else rows, stored)
    return float8_matmul(quantized, named["weight"], named["weight_scale"], bias, x)


KERNEL = Kernel("float8_compressed_tensors", "triton", refuse, linear, linear_input_grad, _PRIORITY, on_trial=True)
