"""Marks for tests of what not every supported torch can do on a CPU."""

from __future__ import annotations

import pytest
import torch


def _multiplies_float8_rows() -> bool:
    """Whether torch multiplies 8-bit floats under a scale for each row here; on a GPU every version does."""
    left, right = torch.ones(2, 16).to(torch.float8_e4m3fn), torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(left, right.t(), torch.ones(2, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_float8_rows = pytest.mark.skipif(
    not _multiplies_float8_rows(),
    reason=f"torch {torch.__version__} multiplies 8-bit floats on a CPU under one scale only",
)
