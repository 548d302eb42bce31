"""The product of int8 inputs and int8 weights on a GPU's units for integers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quantcore.kernels.dispatch import REFERENCE, Kernel, Problem
from quantcore.kernels.int8 import Scaled, int8_matmul
from quantcore.kernels.reference import linear_input_grad
from quantcore_misc.compressed_tensors.plain import IntegerWeight
from quantcore_misc.compressed_tensors.weight import FLOATS

_PRIORITY = REFERENCE.priority + 20
_LONGEST_SUM = 1 << 17  # columns whose products an int32 holds


def refuse(problem: Problem) -> str | None:
    """Why integer products cannot serve a problem, or None."""
    weight_format = problem.weight_format
    if not isinstance(weight_format, IntegerWeight) or weight_format.scaling is None:
        return "serves weights of one int8 code an element"
    rounding, scaling = weight_format.input, weight_format.scaling
    if rounding is None or rounding.integer_bits is None or weight_format.output is not None:
        return "serves inputs that are rounded to integers, and outputs that are not rounded"
    if scaling.columns or scaling.rows > 1 or rounding.strategy == "group":
        return "serves one scale for the tensor or for each row, of weight and input"
    if not rounding.is_symmetric or weight_format.has_zero:
        return "serves codes without zero points"
    if problem.device != "cuda":
        return f"runs on a CUDA or HIP device, not on {problem.device}"
    if problem.dtype not in FLOATS or problem.K >= _LONGEST_SUM:
        return f"serves float32, bfloat16 and float16, and less than {_LONGEST_SUM} columns"
    return None


def linear(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: IntegerWeight, out_features: int
) -> Tensor:
    """x [..., K] rounded to int8, times the codes, under the scales of both; bias [N] added before one rounding."""
    assert weight_format.input is not None
    rounding, rows, shape = weight_format.input, x.reshape(-1, x.shape[-1]), (out_features, x.shape[-1])
    named = dict(zip(weight_format.operand_names(shape), operands, strict=True))
    stored = named["input_scale"].to(x.dtype) if rounding.is_static else None
    quantized = rounding.quantize(rows, stored)
    of_rows = quantized.scale.reshape(-1).expand(rows.shape[0])
    of_columns = named["weight_scale"].reshape(-1).expand(out_features)
    y = int8_matmul(quantized.codes, named["weight"], Scaled(of_rows, of_columns, x.dtype, bias))
    return y.view(*x.shape[:-1], out_features)


KERNEL = Kernel("int8_compressed_tensors", "triton", refuse, linear, linear_input_grad, _PRIORITY, on_trial=True)
