"""The config of Gemma's quantized files, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantcore.sdk import (
    QuantizationConfigMixin,
    QuantizationMethod,
    check_limits,
    check_type,
    option,
    patterns,
    spellings,
)

BITS = (2, 4, 8)
_OWN = "num_bits"


@dataclass(eq=False, repr=False)
class GemmaQuantizationConfig(QuantizationConfigMixin):
    """Integers under one scale for each output, and inputs and outputs rounded where a scale is stored.

    module_quant_configs: for patterns of module names, of which the first that is found in a name counts, other bits.
    """

    quant_method = QuantizationMethod.GEMMA

    num_bits: int = option(4, choices=BITS, help="bits of a code where no pattern says others")
    quantize_embeddings: bool = option(False, help="quantize embeddings too")
    module_quant_configs: dict[str, dict[str, Any]] | None = option(None, help="bits by pattern of module names")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")

    def validate(self) -> None:
        """Check every field and pattern. Raises TypeError or ValueError naming the key."""
        super().validate()
        for pattern, values in (self.module_quant_configs or {}).items():
            label = f"GemmaQuantizationConfig.module_quant_configs[{pattern!r}]"
            patterns.check(pattern, label)
            unknown = sorted(set(values) - {_OWN})
            if unknown:
                raise ValueError(f"{label} has unknown keys {', '.join(unknown)}; use {_OWN}")
            check_type(values.get(_OWN, self.num_bits), int, f"{label}.{_OWN}")
            check_limits(values.get(_OWN, self.num_bits), f"{label}.{_OWN}", choices=BITS)

    def bits_of(self, name: str) -> int:
        """Bits of the codes of a module."""
        for pattern, values in (self.module_quant_configs or {}).items():
            if any(patterns.matches(pattern, each, "anywhere") for each in spellings(name)):
                return int(values.get(_OWN, self.num_bits))
        return self.num_bits
