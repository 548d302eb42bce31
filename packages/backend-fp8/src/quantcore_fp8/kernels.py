"""The GPU kernels of 8-bit floats. Triton is imported when a problem on a GPU is asked about.

Three paths: torch's own scaled product where weights have a scale per tensor or row, a Triton product of E4M3 by E4M3
for blocks, and for GPUs without such units the skeletons of the core over weights alone, with the input rounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.kernels.dispatch import REFERENCE, Kernel, Problem
from quantcore.kernels.reference import linear_input_grad
from quantcore.kernels.triton.kernels import kernels_for
from quantcore_fp8.format import ROW, TENSOR, Fp8
from quantcore_fp8.format_fp4 import Fp4Expert

_PRIORITY = REFERENCE.priority + 15  # before the skeletons, which read weights alone
_MULTIPLE = 16  # of N and K, for torch._scaled_mm
_LEAST_GROUP = 32  # columns that one tl.dot of 8-bit floats takes
_MOST_GROUP = 256


@cache
def fp8_kernels() -> tuple[Kernel, ...]:
    """Every kernel of this backend; its methods share them."""
    skeletons = [_with_rounded_input(kernel) for kernel in kernels_for("fp8", "quantcore_fp8.decode:decoder_for")]
    return (
        Kernel("scaled_mm_fp8", "triton", refuse_scaled_mm, scaled_mm, linear_input_grad, _PRIORITY, on_trial=True),
        Kernel("blocks_fp8", "triton", refuse_blocks, blocks, linear_input_grad, _PRIORITY, on_trial=True),
        *skeletons,
    )


def refuse_scaled_mm(problem: Problem) -> str | None:
    """Why torch's scaled product cannot serve a problem, or None."""
    weight_format = problem.weight_format
    if not isinstance(weight_format, Fp8) or weight_format.block not in (ROW, TENSOR):
        return "serves E4M3 weights with one scale, or one for each row"
    if weight_format.activation is None or weight_format.activation.strategy == "group":
        return "serves inputs in E4M3 with one scale for each token, or one for all"
    if problem.device != "cuda":
        return f"runs on a CUDA device, not on {problem.device}"
    if problem.dtype != torch.bfloat16:
        return f"gives bfloat16, not {problem.dtype}"
    if problem.N % _MULTIPLE or problem.K % _MULTIPLE:
        return f"N {problem.N} and K {problem.K} must be multiples of {_MULTIPLE}"
    return _no_units()


def refuse_blocks(problem: Problem) -> str | None:
    """Why the product of blocks cannot serve a problem, or None."""
    weight_format = problem.weight_format
    rounding = weight_format.activation if isinstance(weight_format, Fp8) else None
    if not isinstance(weight_format, Fp8) or rounding is None or rounding.strategy != "group":
        return "serves E4M3 weights whose inputs are E4M3 in groups of columns"
    columns = weight_format.block[1]
    if columns != rounding.group_size or columns & (columns - 1) or not _LEAST_GROUP <= columns <= _MOST_GROUP:
        return f"needs groups of 32, 64, 128 or 256 columns, the same in weight and input, not {columns}"
    if problem.device != "cuda":
        return f"runs on a CUDA device, not on {problem.device}"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return _no_units()


def scaled_mm(
    x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: Fp8, out_features: int
) -> Tensor:
    """torch's product of E4M3 by E4M3, scales for rows on both sides; x [..., K] bfloat16."""
    named, rounding = _named(weight_format, operands, (out_features, x.shape[-1])), weight_format.activation
    assert rounding is not None
    rows = x.reshape(-1, x.shape[-1])
    quantized = rounding.quantize(rows, named.get(weight_format.input_scale))
    w_scale = weight_format.scales(named, (out_features, rows.shape[1]))
    scales = _expanded(quantized.scale, rows.shape[0])[:, None], _expanded(w_scale, out_features)[None]
    y = torch._scaled_mm(quantized.codes, named["weight"].t(), *scales, out_dtype=x.dtype)
    return _finish(y if bias is None else y.add_(bias), x)


def blocks(x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: Fp8, out_features: int) -> Tensor:
    """The Triton product of E4M3 by E4M3, with both scales applied to the sums of each group of columns."""
    from quantcore_fp8.block_matmul import block_matmul

    named, rounding = _named(weight_format, operands, (out_features, x.shape[-1])), weight_format.activation
    assert rounding is not None
    rows = x.reshape(-1, x.shape[-1])
    scale = weight_format.scales(named, (out_features, rows.shape[1]))
    quantized = rounding.quantize(rows)
    y = block_matmul(quantized, named["weight"], scale, weight_format.sides((out_features, rows.shape[1])), x.dtype)
    return _finish(y if bias is None else y.add_(bias), x)


def _with_rounded_input(kernel: Kernel) -> Kernel:
    """A kernel of weights alone, as one of formats that round their input: x is rounded first, in its own dtype."""

    def linear(
        x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
    ) -> Tensor:
        assert isinstance(weight_format, Fp8 | Fp4Expert)
        rounded = _rounded(x, operands, weight_format)
        y: Tensor = kernel.linear(rounded, operands[:2], None, weight_format, out_features)
        return y if bias is None else y.add_(bias)

    def input_grad(grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int) -> Tensor:
        found: Tensor = kernel.linear_input_grad(grad, operands[:2], weight_format, in_features)
        return found

    def grouped(
        x: Tensor, ends: Tensor, experts: Sequence[Sequence[Tensor]], weight_format: WeightFormat, out_features: int
    ) -> Tensor:
        assert isinstance(weight_format, Fp8 | Fp4Expert)
        assert kernel.grouped_linear is not None
        weights = [operands[:2] for operands in experts]
        return kernel.grouped_linear(_rounded(x, (), weight_format), ends, weights, weight_format, out_features)

    def refuse(problem: Problem) -> str | None:
        rounding = getattr(problem.weight_format, "activation", None)
        if problem.op == "grouped_linear" and rounding and (rounding.is_static or rounding.strategy == "tensor"):
            return "experts each round their input by a scale of their own"
        return kernel.refuse(problem)

    of_experts = grouped if kernel.grouped_linear else None
    return replace(kernel, refuse=refuse, linear=linear, linear_input_grad=input_grad, grouped_linear=of_experts)


def _rounded(x: Tensor, operands: Sequence[Tensor], weight_format: Fp8 | Fp4Expert) -> Tensor:
    rounding: Activation | None = weight_format.activation
    if rounding is None:
        return x
    return rounding.fake_quantize(x, operands[2] if rounding.is_static else None)


def _named(weight_format: Fp8, operands: Sequence[Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    return dict(zip(weight_format.operand_names(shape), operands, strict=True))


def _expanded(scale: Tensor, count: int) -> Tensor:
    """One float32 scale for each of count rows, in memory of its own: torch asks for strides that views lack."""
    return scale.float().reshape(-1).expand(count).clone(memory_format=torch.contiguous_format)


def _finish(y: Tensor, x: Tensor) -> Tensor:
    return y.view(*x.shape[:-1], y.shape[-1])


def _no_units() -> str | None:
    """Why this GPU cannot multiply 8-bit floats, or None."""
    if torch.version.hip is not None:
        return "gfx942 multiplies another E4M3 than files hold; use gemm_fp8"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 9) else f"compute capability {capability} has no 8-bit float units; use gemm_fp8"
