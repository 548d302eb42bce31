"""bitsandbytes for quantcore: NF4 and FP4 weights in the layout of the upstream package."""

from __future__ import annotations

from quantcore_bnb.bitsandbytes import quantcore_backends, quantcore_match_config

__all__ = ["quantcore_backends", "quantcore_match_config"]
