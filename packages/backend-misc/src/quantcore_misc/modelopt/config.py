"""The config of NVIDIA's Model Optimizer, as its exports write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, check_limits, check_type, option, spellings

WEIGHT_ALONE, ROUNDED, AWQ, FP8, MIXED = "W4A16_NVFP4", "NVFP4", "NVFP4_AWQ", "FP8", "MIXED_PRECISION"
FP8_INPUTS, MXFP4_FP8_INPUTS, MXFP8 = "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP8"
ALGORITHMS = (ROUNDED, WEIGHT_ALONE, FP8_INPUTS, MXFP4_FP8_INPUTS, AWQ, FP8, MXFP8, MIXED)
_GROUPS = {MXFP8: 32, MXFP4_FP8_INPUTS: 32}  # inputs that share a scale; 16 of the others


@dataclass(eq=False, repr=False)
class ModelOptConfig(QuantizationConfigMixin):
    """How layers are stored, all alike or each by its own entry in quantized_layers.

    Source: nvidia-modelopt 0.47.
    """

    quant_method = "modelopt"

    quant_algo: str = option(
        ROUNDED, choices=ALGORITHMS, only_read=(AWQ,), help="what weights and inputs are rounded to"
    )
    ignore: list[str] | None = option(None, help="modules that stay float, by name or with *")
    group_size: int | None = option(None, choices=(16, 32), help="inputs that share a scale; as quant_algo has it")
    quantized_layers: dict[str, dict[str, Any]] | None = option(None, help="quant_algo by module, of MIXED_PRECISION")
    config_groups: dict[str, Any] | None = option(None, help="the same in the words of compressed-tensors; kept")
    kv_cache_quant_algo: str | None = option(None, help="how keys and values are rounded, where scales are stored")
    kv_cache_scheme: dict[str, Any] | None = option(None, help="the same in the words of compressed-tensors; kept")
    producer: dict[str, Any] | None = option(None, help="what made the files")

    def __post_init__(self) -> None:
        if self.group_size is None:
            self.group_size = _GROUPS.get(str(self.quant_algo), 16)
        super().__post_init__()

    def validate(self) -> None:
        """Check every field and every layer's entry. Raises TypeError or ValueError naming the key."""
        super().validate()
        needed = _GROUPS.get(self.quant_algo, 16)
        if self.group_size != needed and self.quant_algo not in (FP8, MIXED):
            raise ValueError(
                f"ModelOptConfig.group_size must be {needed} with {self.quant_algo}, got {self.group_size}"
            )
        for name, entry in (self.quantized_layers or {}).items():
            label = f"ModelOptConfig.quantized_layers[{name!r}]"
            check_type(entry, dict[str, Any], label)
            check_limits(entry.get("quant_algo"), f"{label}.quant_algo", choices=ALGORITHMS[:-1])

    def algorithm(self, name: str) -> str | None:
        """The algorithm of a layer, None where it stays float."""
        if self.quant_algo != MIXED:
            return self.quant_algo
        entries: Mapping[str, Any] = self.quantized_layers or {}
        known = next((each for each in spellings(name) if each in entries), None)
        return None if known is None else str(entries[known]["quant_algo"])


def is_named(name: str, pattern: str) -> bool:
    """Whether a pattern with * names a module, or one above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
