"""Scales in the dtype that is stored, or an error where that cannot hold the weight they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.formats.dtypes import dtype_name


def held_scales(scale: Tensor, dtype: torch.dtype, name: str, steps: Tensor | float = 1.0) -> Tensor:
    """Scales of any float dtype in dtype, the one in which they are stored and codes are multiplied.

    name: of the stored tensor. steps: how far from 0 a code under each scale may lie, broadcastable.
    Raises ValueError where a scale, or what the farthest code stands for, is not finite in dtype.
    """
    most = torch.finfo(dtype).max
    farthest = (scale.double() * steps).abs()
    if farthest.numel() and not bool((farthest <= most).all()):
        raise ValueError(
            f"{name}: {dtype_name(dtype)} holds numbers up to {most:g}, and codes under these scales stand for up to "
            f"{float(farthest.nan_to_num(torch.inf).max()):g}; make the weight smaller, or choose a method whose "
            "scales are float32, such as bitsandbytes or hqq"
        )
    return scale.to(dtype)
