"""Modules that hold quantized weights."""

from __future__ import annotations

from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.module import QuantizedModule

__all__ = ["QuantizedEmbedding", "QuantizedExperts", "QuantizedLinear", "QuantizedModule"]
