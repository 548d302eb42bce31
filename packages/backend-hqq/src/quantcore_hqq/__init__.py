"""HQQ for quantcore: half-quadratic quantization in the layout of the upstream package."""

from __future__ import annotations

from quantcore_hqq.hqq import quantcore_backends

__all__ = ["quantcore_backends"]
