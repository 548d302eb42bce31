"""The config of quanto, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option

_WEIGHTS = ("float8", "int8", "int4", "int2")
_ACTIVATIONS = ("int8", "float8", "qint8", "qfloat8", "qfloat8_e4m3fn", "qfloat8_e5m2")


@dataclass(eq=False, repr=False)
class QuantoConfig(QuantizationConfigMixin):
    """Weights in 2, 4 or 8 bits, and inputs and outputs in 8 where they were measured.

    Source: optimum-quanto 0.2.7.
    """

    quant_method = QuantizationMethod.QUANTO

    weights: str = option("int8", choices=_WEIGHTS, help="what weights are stored as")
    activations: str | None = option(
        None, choices=_ACTIVATIONS, only_read=_ACTIVATIONS, help="what inputs and outputs are rounded to"
    )
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming the field."""
        super().validate()
        if self.weights is None:
            raise ValueError(f"QuantoConfig.weights must be one of {', '.join(_WEIGHTS)}, got None")
