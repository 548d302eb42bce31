"""The config of EETQ, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option


@dataclass(eq=False, repr=False)
class EetqConfig(QuantizationConfigMixin):
    """Integers of 8 bits with one scale for each output, without data."""

    quant_method = QuantizationMethod.EETQ

    weights: str = option("int8", choices=("int8",), help="what weights are stored as")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
