"""The decoder of AutoRound weights: that of the tensors in which they are stored."""

from __future__ import annotations

from quantcore.sdk import Decoder, WeightFormat
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq
from quantcore_gptq.awq.decode import decoder_for as awq_decoder
from quantcore_gptq.gptq.decode import decoder_for as gptq_decoder


def decoder_for(weight_format: WeightFormat) -> Decoder | None:
    """The decoder of a format of this method; None for any other."""
    if isinstance(weight_format, AutoRoundAwq):
        return awq_decoder(weight_format)
    return gptq_decoder(weight_format) if isinstance(weight_format, AutoRoundGptq) else None
