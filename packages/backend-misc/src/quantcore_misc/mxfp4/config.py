"""The config of transformers' mxfp4, as it stands in the files of gpt-oss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option


@dataclass(eq=False, repr=False)
class Mxfp4Config(QuantizationConfigMixin):
    """FP4 weights in blocks of 32 inputs under one power of two; inputs stay float.

    Source: OCP Microscaling Formats (MX) v1.0; gpt-oss-120b & gpt-oss-20b Model Card (arXiv:2508.10925).
    """

    quant_method = QuantizationMethod.MXFP4

    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    dequantize: bool = option(False, help="load the weights as floats")

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json: `dequantize` says how one load goes, and is not among it."""
        values = super().to_dict()
        del values["dequantize"]
        return values

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a user's config may change of a checkpoint's."""
        return {"dequantize": self.dequantize}
