"""The kernel `cpu_native`: products of every weight whose family the library multiplies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantcore.sdk import Kernel, Layout, Prepared, Problem, WeightFormat, dtype_name, reference
from quantcore_cpu.cache import packed_weight
from quantcore_cpu.families import PACKERS
from quantcore_cpu.library import FLOAT_TYPES, why_missing
from quantcore_cpu.packed import NativeWeight, grouped_linear as grouped_product
from quantcore_cpu.units import Units

_PIECE = 1 << 22  # elements of a weight that are held as floats at a time


def refuse(problem: Problem) -> str | None:
    """Why the library cannot serve a problem, or None."""
    if problem.device != "cpu":
        return f"runs on a CPU, not on {problem.device}"
    if (missing := why_missing()) is not None:
        return missing
    if problem.dtype not in FLOAT_TYPES:
        return f"serves {', '.join(map(dtype_name, FLOAT_TYPES))}, not {dtype_name(problem.dtype)}"
    return _refuse_format(problem.weight_format)


def layout(weight_format: WeightFormat, shape: tuple[int, ...], device: torch.device) -> Layout | None:
    """Packed units, for a weight on a CPU that the library multiplies."""
    serves = device.type == "cpu" and len(shape) == 2 and why_missing() is None
    return Units() if serves and _refuse_format(weight_format) is None else None


def _refuse_format(weight_format: WeightFormat) -> str | None:
    if isinstance(weight_format, Prepared):
        if not isinstance(weight_format.layout, Units):
            return f"reads the layout Units, not {weight_format.layout!r}"
        weight_format = weight_format.weight
    family = weight_format.family
    if family is None:
        return f"{type(weight_format).__name__} lowers to no family"
    if family not in PACKERS:
        return f"serves the families {', '.join(PACKERS)}, not {family}"
    return None


def linear(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
) -> Tensor:
    """x [..., K], rounded as the layer does, times the weight [N, K], plus bias [N], in the dtype of the format.

    Inputs that the layer rounds to few bits are held exactly by the integers that the library multiplies.
    """
    packed = packed_weight(operands, weight_format, (out_features, x.shape[-1]))
    if not isinstance(packed, NativeWeight):
        return reference.linear(x, operands, bias, weight_format, out_features)
    named = dict(zip(weight_format.operand_names((out_features, x.shape[-1])), operands, strict=True))
    rounded = weight_format.round_activation("input", x.detach(), named)
    dtype = weight_format.compute_torch_dtype or rounded.dtype
    rows = rounded.reshape(-1, x.shape[-1]).to(dtype)
    y = packed.linear(rows, None if bias is None else bias.detach().to(dtype))
    y = y.to(x.dtype).view(*x.shape[:-1], out_features)
    return weight_format.round_activation("output", y, named)


def linear_input_grad(
    grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int
) -> Tensor:
    """grad [..., N] times the weight [N, K]: a few rows of it at a time, summed in float32."""
    packed = packed_weight(operands, weight_format, (grad.shape[-1], in_features))
    if not isinstance(packed, NativeWeight):
        return reference.linear_input_grad(grad, operands, weight_format, in_features)
    rows = grad.detach().reshape(-1, grad.shape[-1])
    step = max(1, _PIECE // in_features)
    total = torch.zeros(rows.shape[0], in_features)
    for first in range(0, rows.shape[1], step):
        part = rows[:, first : first + step]
        total += part @ packed.dequantize(grad.dtype, first, part.shape[1])
    return total.to(grad.dtype).view(*grad.shape[:-1], in_features)


def grouped_linear(
    x: Tensor, ends: Tensor, experts: Sequence[Sequence[Tensor]], weight_format: WeightFormat, out_features: int
) -> Tensor:
    """Each row of x [M, K] times the weight of its expert: expert e has the rows from ends[e - 1] to ends[e]."""
    shape = (out_features, x.shape[-1])
    packed = [packed_weight(operands, weight_format, shape) for operands in experts]
    found = [weight for weight in packed if isinstance(weight, NativeWeight)]
    if len(found) != len(experts) or weight_format.weight_alone() != weight_format:
        return reference.grouped_linear(x, ends, experts, weight_format, out_features)
    dtype = weight_format.compute_torch_dtype or x.dtype
    return grouped_product(x.detach().to(dtype), ends, found).to(x.dtype)


KERNELS = (
    Kernel(
        "cpu_native",
        "cpu",
        refuse,
        linear,
        linear_input_grad,
        priority=100,
        on_trial=True,
        grouped_linear=grouped_linear,
        layout=layout,
    ),
)
