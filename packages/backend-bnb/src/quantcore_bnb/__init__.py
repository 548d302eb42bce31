"""bitsandbytes for quantcore: NF4 and FP4 weights in the layout of the upstream package."""

from quantcore_bnb.bitsandbytes import quantcore_backends, quantcore_match_config

__all__ = ["quantcore_backends", "quantcore_match_config"]
