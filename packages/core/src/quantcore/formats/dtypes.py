"""Dtypes by their bare names, looked up in a table and never evaluated."""

from __future__ import annotations

import torch


def describe(dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> str:
    """A tensor's dtype and shape as errors spell them: `uint8 [96, 1]`."""
    return f"{dtype_name(dtype)} {list(shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """The bare name of a dtype: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


FLOAT_DTYPES: dict[str, torch.dtype] = {
    dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def float_dtype(name: str, label: str) -> torch.dtype:
    """A float dtype by name ("bfloat16", "torch.bfloat16"), looked up in a table. Raises ValueError naming label."""
    try:
        return FLOAT_DTYPES[name.removeprefix("torch.")]
    except KeyError:
        raise ValueError(f"{label}: {name!r:.60} is none of {', '.join(FLOAT_DTYPES)}") from None
