# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Rounding of float32 values inside kernels, the same on a GPU and in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """Values rounded to the nearest number of dtype, ties to even; of dtype, or float32 in the interpreter.

    The interpreter truncates bfloat16 and cannot compute with it, so there the float32 bits are rounded.
    """
    if INTERPRETED:
        values = values.to(tl.float32)
        if dtype == tl.bfloat16:
            bits = values.to(tl.int32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            nearest = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
            result = tl.where(values == values, nearest, values)
        else:
            result = values.to(dtype).to(tl.float32)
    else:
        result = values.to(dtype)
    return result


INTERPRETED = tl.constexpr(not isinstance(rounded, triton.JITFunction))
