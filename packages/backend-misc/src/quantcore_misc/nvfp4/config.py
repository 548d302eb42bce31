"""The config of transformers' nvfp4."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option


@dataclass(eq=False, repr=False)
class NVFP4Config(QuantizationConfigMixin):
    """FP4 weights in blocks of 16 under FP8 scales; inputs stay float, as in transformers for few rows."""

    quant_method = QuantizationMethod.NVFP4

    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
