"""The quantizer of Gemma's files."""

from __future__ import annotations

from torch import nn

from quantcore.sdk import WeightFormat, WeightQuantizer
from quantcore_misc.gemma.config import GemmaQuantizationConfig
from quantcore_misc.gemma.format import GemmaWeight, embedding_format, linear_format


class GemmaQuantizer(WeightQuantizer):
    """Every linear layer with the bits that the config says for its name, and embeddings where it asks for them."""

    quantization_config: GemmaQuantizationConfig

    def format_for(self, name: str, module: nn.Module) -> GemmaWeight:
        return linear_format(self.quantization_config.bits_of(name))

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> WeightFormat | None:
        if not self.quantization_config.quantize_embeddings and not self.pre_quantized:
            return None
        return embedding_format(self.quantization_config.bits_of(name))
