"""Products of 8-bit floats under scales of rows, on the units that GPUs have for them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.kernels.kernel import Problem

_MULTIPLE = 16  # of N and K, for torch._scaled_mm
_LEAST_CAPABILITY = (8, 9)


def refuse_float8(problem: Problem, rounding: Activation | None) -> str | None:
    """Why `float8_matmul` cannot serve a problem whose input is rounded so, or None."""
    if rounding is None or rounding.element != "e4m3" or rounding.strategy == "group" or rounding.outer is not None:
        return "serves inputs in E4M3 with one scale for each token, or one for all"
    if problem.device != "cuda":
        return f"runs on a CUDA device, not on {problem.device}"
    if problem.dtype != torch.bfloat16:
        return f"gives bfloat16, not {problem.dtype}"
    if problem.N % _MULTIPLE or problem.K % _MULTIPLE:
        return f"N {problem.N} and K {problem.K} must be multiples of {_MULTIPLE}"
    return refuse_device()


def refuse_device() -> str | None:
    """Why this GPU cannot multiply E4M3 by E4M3, or None."""
    if torch.version.hip is not None:
        return "gfx942 multiplies another E4M3 than files hold"
    capability = torch.cuda.get_device_capability()
    return None if capability >= _LEAST_CAPABILITY else f"compute capability {capability} has no 8-bit float units"


def float8_matmul(left: QuantizedInput, right: Tensor, scale: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product of an input [M, K] and a weight [N, K], both E4M3 codes under scales, plus bias: for x [..., K].

    The scale of each is one number, or one for each row, of any float dtype and shape. Returns [..., N] in x's dtype.
    """
    (M, N), dtype = (left.codes.shape[0], right.shape[0]), x.dtype
    scales = _expanded(left.scale, M)[:, None], _expanded(scale, N)[None]
    y = torch._scaled_mm(left.codes, right.t(), *scales, out_dtype=dtype)
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], N)


def _expanded(scale: Tensor, count: int) -> Tensor:
    """One float32 scale for each of count rows, in memory of its own: torch asks for strides that views lack."""
    return scale.float().reshape(-1).expand(count).clone(memory_format=torch.contiguous_format)
