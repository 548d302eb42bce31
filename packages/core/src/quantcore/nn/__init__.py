"""Modules that hold quantized weights."""

from __future__ import annotations

from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.module import QuantizedModule
from quantcore.nn.online import OnlineLinear
from quantcore.nn.replace import prepare

__all__ = ["OnlineLinear", "QuantizedEmbedding", "QuantizedExperts", "QuantizedLinear", "QuantizedModule", "prepare"]
