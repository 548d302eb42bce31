# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""One step of the HQQ solver as a Triton kernel: a group's values are read once, and only two numbers are written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantcore.sdk import on_device
from quantcore_hqq.hqq.shrinkage import BETA, LP_NORM, SHRINK_FROM

_PROGRAM = 2048  # values of one program, or one group: sixteen a thread
_LONGEST_GROUP = 16384
_MOST_WARPS = 16  # 1024 threads on HIP


def fits(group_length: int) -> bool:
    """Whether the kernel serves groups of so many values."""
    return group_length <= _LONGEST_GROUP


def step(part: Tensor, inv_scale: Tensor, zero: Tensor, top: int, axis: int) -> tuple[Tensor, Tensor]:
    """The next zero of each group, and its sum of |weight - dequantized| under the present zero.

    part: groups as rows (axis 1) or columns (axis 0), float; inv_scale, zero: float32, one a group. As the reference's
    step but for the order of sums and the last bit of the power.
    """
    length, groups = part.shape[axis], part.shape[1 - axis]
    new_zero, error = torch.empty_like(zero), torch.empty_like(zero)
    width = triton.next_power_of_2(length)
    rows = max(1, _PROGRAM // width)
    strides = (part.stride(1 - axis), part.stride(axis))
    with on_device(part.device):
        _step_kernel[(triton.cdiv(groups, rows),)](
            part, inv_scale.contiguous(), zero.contiguous(), new_zero, error, groups, *strides,
            float(top), LP_NORM - 1, 1 / BETA, SHRINK_FROM,
            LENGTH=length, BG=rows, BK=width, num_warps=min(max(4, width // 512), _MOST_WARPS), enable_fp_fusion=False,
        )  # fmt: skip
    return new_zero, error


@triton.jit
def _step_kernel(
    weight, inv_scale, zero, new_zero, error, groups, stride_g, stride_k, top, power, inv_beta, shrink_from,
    LENGTH: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """new_zero and error of BG groups of LENGTH values, for which there is room in BK."""
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    k = tl.arange(0, BK)
    mask = (g < groups)[:, None]
    if LENGTH < BK:
        mask = mask & (k < LENGTH)[None, :]
    w = tl.load(weight + g[:, None] * stride_g + k[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inv_scale + g, mask=g < groups, other=1.0)
    reciprocal = tl.div_rn(tl.full([BG], 1.0, tl.float32), inverse)[:, None]
    inverse = inverse[:, None]
    origin = tl.load(zero + g, mask=g < groups, other=0.0)[:, None]
    scaled = w * inverse
    codes = tl.minimum(tl.maximum(round_even(scaled + origin), 0.0), top)
    residual = w - divided(codes - origin, inverse, reciprocal)
    magnitude = tl.abs(residual)
    if LENGTH < BK:
        magnitude = tl.where(mask, magnitude, 0.0)
    if tl.max(magnitude) >= shrink_from:
        # The generalized soft threshold of the l_p norm; where the residual is 0 the power is infinite, and 0 is left.
        shrunk = tl.maximum(magnitude - tl.exp2(power * tl.log2(magnitude)) * inv_beta, 0.0)
        scaled = (w - tl.where(residual < 0, -shrunk, shrunk)) * inverse
    shifted = codes - scaled
    if LENGTH < BK:
        shifted = tl.where(mask, shifted, 0.0)
    tl.store(new_zero + g, tl.sum(shifted, 1) / LENGTH, mask=g < groups)
    tl.store(error + g, tl.sum(magnitude, 1), mask=g < groups)


@triton.jit
def divided(values, divisor, reciprocal):
    """values / divisor, rounded as a division rounds, given the rounded reciprocal: a third of its instructions.

    Source: Markstein 1990, Computation of elementary functions on the IBM RISC System/6000 processor.
    """
    quotient = values * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, values), reciprocal, quotient)


@triton.jit
def round_even(values):
    """Nearest integers of magnitudes below 2**22, ties to even: the sum's own rounding does it."""
    shift = 12582912.0  # 1.5 * 2**23
    return (values + shift) - shift
