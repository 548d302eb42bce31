"""The decoder of SINQ weights in strips, whose column scales are applied to the layer's input."""

from __future__ import annotations

from functools import cache

from quantcore.sdk import Decoder, WeightFormat
from quantcore_hqq.grouped_decoder import grouped_decoder
from quantcore_hqq.packing import PACKINGS
from quantcore_hqq.sinq.format import LEAST_TILE, SinqStrips


@cache
def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of packed strips with a zero for each group; None for any other format."""
    if type(weight_format) is not SinqStrips or weight_format.loose is not None or weight_format.one_zero is not None:
        return None
    width = weight_format.tile or weight_format.group_size
    halvings = 0 if weight_format.tile else max(0, (width // LEAST_TILE).bit_length() - 1)
    packing, steps = PACKINGS[weight_format.packing], weight_format.steps_dtype
    return grouped_decoder("sinq", packing, 1, width, steps, halvings)
