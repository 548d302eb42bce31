"""One step of the HQQ solver as a Triton kernel: a group's values are read once, and only two numbers are written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAM = 2048  # values of one program: sixteen a thread
_LONGEST_GROUP = 16384


def fits(group_length: int) -> bool:
    """Whether the kernel serves groups of so many values."""
    return group_length <= _LONGEST_GROUP


def step(
    part: Tensor, inv_scale: Tensor, zero: Tensor, top: int, axis: int, lp_norm: float, beta: float
) -> tuple[Tensor, Tensor]:
    """The next zero of each group, and its sum of |weight - dequantized| under the present zero.

    part: groups as rows (axis 1) or columns (axis 0), float; inv_scale, zero: float32, one a group. As the reference's
    step but for the order of sums and the last bit of the power.
    """
    length, groups = part.shape[axis], part.shape[1 - axis]
    new_zero, error = torch.empty_like(zero), torch.empty_like(zero)
    width = triton.next_power_of_2(length)
    rows = max(1, _PROGRAM // width)
    strides = (part.stride(1 - axis), part.stride(axis))
    arguments = (part, inv_scale.contiguous(), zero.contiguous(), new_zero, error, groups, length, *strides)
    sizes = {"BG": rows, "BK": width, "enable_fp_fusion": False}
    with _on(part.device):
        _step_kernel[(triton.cdiv(groups, rows),)](*arguments, float(top), lp_norm - 1, 1 / beta, **sizes)
    return new_zero, error


@triton.jit
def _step_kernel(
    weight, inv_scale, zero, new_zero, error, groups, length, stride_g, stride_k, top, power, inv_beta,
    BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    k = tl.arange(0, BK)
    mask = (g < groups)[:, None] & (k < length)[None, :]
    w = tl.load(weight + g[:, None] * stride_g + k[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inv_scale + g, mask=g < groups, other=1.0)[:, None]
    origin = tl.load(zero + g, mask=g < groups, other=0.0)[:, None]
    steps = w * inverse + origin
    codes = tl.minimum(tl.maximum(round_even(steps), 0.0), top)
    residual = w - tl.div_rn(codes - origin, tl.broadcast_to(inverse, codes.shape))
    magnitude = tl.abs(residual)
    # The generalized soft threshold of the l_p norm; where the residual is 0 the power is infinite, and 0 is left.
    shrunk = tl.maximum(magnitude - tl.exp2(power * tl.log2(magnitude)) * inv_beta, 0.0)
    shrunk = tl.where(residual < 0, -shrunk, shrunk)
    shifted = tl.where(mask, codes - (w - shrunk) * inverse, 0.0)
    tl.store(new_zero + g, tl.sum(shifted, 1) / length, mask=g < groups)
    tl.store(error + g, tl.sum(tl.where(mask, magnitude, 0.0), 1), mask=g < groups)


@triton.jit
def round_even(values):
    """Nearest integers of magnitudes below 2**22, ties to even: the sum's own rounding does it."""
    shift = 12582912.0  # 1.5 * 2**23
    return (values + shift) - shift


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
