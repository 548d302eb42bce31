"""The config of fbgemm_fp8, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option


@dataclass(eq=False, repr=False)
class FbgemmFp8Config(QuantizationConfigMixin):
    """E4M3 weights with one scale for each output row; inputs are rounded per token, magnitudes bounded.

    Source: The Llama 3 Herd of Models (arXiv:2407.21783), section 6.2.
    """

    quant_method = QuantizationMethod.FBGEMM_FP8

    activation_scale_ub: float = option(
        1200.0, minimum=0.0, help="bound of the largest magnitude of a token; what is above it saturates"
    )
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float; none: the output head")

    def validate(self) -> None:
        """Check every field."""
        if isinstance(self.activation_scale_ub, int) and not isinstance(self.activation_scale_ub, bool):
            self.activation_scale_ub = float(self.activation_scale_ub)
        super().validate()
        if self.activation_scale_ub == 0:
            raise ValueError(f"{self._label('activation_scale_ub')} must be above 0: all inputs would saturate")

    def get_loading_attributes(self) -> dict[str, Any]:
        """The bound: the skip list of a checkpoint says what it holds."""
        return {"activation_scale_ub": self.activation_scale_ub}
