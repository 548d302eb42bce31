"""The decoder of HQQ weights of every bit width, grouped along either axis."""

from __future__ import annotations

from functools import cache

from quantcore.sdk import TRITON_DTYPES, Decoder, WeightFormat
from quantcore_hqq.grouped_decoder import grouped_decoder
from quantcore_hqq.hqq.format import Hqq
from quantcore_hqq.packing import PACKINGS


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a format that computes in float32, bfloat16 or float16; None for any other."""
    if type(weight_format) is not Hqq or weight_format.compute_torch_dtype not in TRITON_DTYPES:
        return None
    axis = weight_format.axis if weight_format.channel_wise else -1
    length = (weight_format.group_size or 0) if weight_format.channel_wise else 0
    return grouped_decoder("hqq", PACKINGS[weight_format.packing], axis, length, weight_format.compute_torch_dtype)
