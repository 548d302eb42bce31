"""The GPU kernels of 8-bit floats. Triton is imported when a problem on a GPU is asked about.

Three paths: torch's own scaled product where weights have a scale per tensor or row, a Triton product of E4M3 by E4M3
for blocks, and for GPUs without such units the core's kernels of scaled grids, with the input rounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from quantcore.sdk import REFERENCE, Kernel, Problem, QuantizedInput, float8, reference
from quantcore_fp8.format import ROW, TENSOR, Fp8

_PRIORITY = REFERENCE.priority + 15  # before the skeletons, which read weights alone
_LEAST_GROUP = 32  # columns that one tl.dot of 8-bit floats takes
_MOST_GROUP = 256


@cache
def fp8_kernels() -> tuple[Kernel, ...]:
    """Every kernel of this backend; its methods share them."""
    return (
        Kernel(
            "scaled_mm_fp8",
            "triton",
            refuse_scaled_mm,
            scaled_mm,
            reference.linear_input_grad,
            _PRIORITY,
            on_trial=True,
        ),
        Kernel("blocks_fp8", "triton", refuse_blocks, blocks, reference.linear_input_grad, _PRIORITY, on_trial=True),
    )


def refuse_scaled_mm(problem: Problem) -> str | None:
    """Why torch's scaled product cannot serve a problem, or None."""
    weight_format = problem.weight_format
    if not isinstance(weight_format, Fp8) or weight_format.block not in (ROW, TENSOR):
        return "serves E4M3 weights with one scale, or one for each row"
    return float8.refuse_float8(problem, weight_format.input)


def refuse_blocks(problem: Problem) -> str | None:
    """Why the product of blocks cannot serve a problem, or None."""
    weight_format = problem.weight_format
    rounding = weight_format.input if isinstance(weight_format, Fp8) else None
    if not isinstance(weight_format, Fp8) or rounding is None or rounding.strategy != "group":
        return "serves E4M3 weights whose inputs are E4M3 in groups of columns"
    columns = weight_format.block[1]
    if columns != rounding.group_size or columns & (columns - 1) or not _LEAST_GROUP <= columns <= _MOST_GROUP:
        return f"needs groups of 32, 64, 128 or 256 columns, the same in weight and input, not {columns}"
    if problem.device != "cuda":
        return f"runs on a CUDA device, not on {problem.device}"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return float8.refuse_device()


def scaled_mm(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: Fp8, out_features: int
) -> Tensor:
    """torch's product of E4M3 by E4M3, scales for rows on both sides; x [..., K] bfloat16."""
    quantized, scale = _rounded(x, operands, weight_format, out_features)
    return float8.float8_matmul(quantized, operands[0], scale, bias, x)


def blocks(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: Fp8, out_features: int) -> Tensor:
    """The Triton product of E4M3 by E4M3, with both scales applied to the sums of each group of columns."""
    from quantcore_fp8.block_matmul import block_matmul

    quantized, scale = _rounded(x, operands, weight_format, out_features)
    sides = weight_format.sides((out_features, x.shape[-1]))
    y = block_matmul(quantized, operands[0], scale, sides, x.dtype)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out_features)


def _rounded(
    x: Tensor, operands: Sequence[Tensor], weight_format: Fp8, out_features: int
) -> tuple[QuantizedInput, Tensor]:
    """Codes of the rows of x, and the scales of the weight, float32 [grid]."""
    shape = (out_features, x.shape[-1])
    named = dict(zip(weight_format.operand_names(shape), operands, strict=True))
    quantized = weight_format.quantize_input(x.reshape(-1, x.shape[-1]), named)
    return quantized, weight_format.tables(named, shape)[0]
