"""The config of fouroversix, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, option, spellings

_DTYPES = ("nvfp4", "mxfp4", "if4", "nvint4")
_RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
_OF_DTYPE = {"mxfp4": _RULES[3:], "if4": _RULES[:3], "nvint4": _RULES[3:4]}
_PARTS = ("weight", "activation", "gradient")


@dataclass(eq=False, repr=False)
class FourOverSixConfig(QuantizationConfigMixin):
    """4-bit floats in blocks of 16 (mxfp4: 32) whose scales are chosen by error, for weights and for inputs.

    What is None for weights, activations or gradients is as dtype or scale_rule says. The backends name upstream's
    code, and are kept.
    Source: Cook et al. 2025, Four Over Six (arXiv:2512.02010).
    """

    quant_method = QuantizationMethod.FOUR_OVER_SIX

    activation_dtype: str | None = option(None, choices=_DTYPES, help="what inputs are rounded to")
    activation_scale_rule: str | None = option(None, choices=_RULES, help="how scales of inputs are chosen")
    dtype: str = option("nvfp4", choices=_DTYPES, help="what is rounded to where nothing else is said")
    gradient_dtype: str | None = option(None, choices=_DTYPES, help="what gradients are rounded to in training")
    gradient_scale_rule: str | None = option(None, choices=_RULES, help="how scales of gradients are chosen")
    keep_master_weights: bool = option(False, help="keep float weights, which each forward rounds, to train them")
    matmul_backend: str | None = option(None, choices=("cutlass", "triton", "pytorch"), help="upstream's; kept")
    output_dtype: str | None = option("bfloat16", choices=("bfloat16", "float16", "float32"), help="of a layer's sums")
    quantize_backend: str | None = option(
        None, choices=("cuda", "triton", "pytorch", "transformer_engine"), help="upstream's; kept"
    )
    scale_rule: str = option("mse", choices=_RULES, help="how scales are chosen where nothing else is said")
    weight_dtype: str | None = option(None, choices=_DTYPES, help="what weights are rounded to")
    weight_scale_2d: bool = option(False, help="weights share scales in blocks as high as they are wide")
    weight_scale_rule: str | None = option(None, choices=_RULES, help="how scales of weights are chosen")
    module_config_overrides: dict[str, dict[str, Any]] | None = option(
        None, help="settings of single modules in place of all these, by their names"
    )
    modules_to_not_convert: list[str] | None = option(
        default_factory=lambda: ["lm_head"], help="modules that stay float, by their whole names"
    )

    def validate(self) -> None:
        """Check every field, pairs of dtype and rule, and every module's. Raises TypeError or ValueError."""
        super().validate()
        for part in _PARTS:
            dtype, rule = self.rounding(part)
            if rule not in _OF_DTYPE.get(dtype, _RULES):
                raise ValueError(
                    f"FourOverSixConfig: scales of {part}s in {dtype} cannot be chosen by {rule!r}; set scale_rule or "
                    f"{part}_scale_rule to {' or '.join(_OF_DTYPE[dtype])}"
                )
        for name, entry in (self.module_config_overrides or {}).items():
            try:
                self._replaced(entry)
            except (TypeError, ValueError) as error:
                raise type(error)(f"FourOverSixConfig.module_config_overrides[{name!r}]: {error}") from error

    def rounding(self, part: str) -> tuple[str, str]:
        """The dtype and the rule of "weight", "activation" or "gradient"."""
        own = getattr(self, f"{part}_dtype"), getattr(self, f"{part}_scale_rule")
        return own[0] or self.dtype, own[1] or self.scale_rule

    def for_layer(self, name: str) -> FourOverSixConfig:
        """The settings of a layer."""
        entries: Mapping[str, Any] = self.module_config_overrides or {}
        entry = next((entries[each] for each in spellings(name) if each in entries), None)
        return self if entry is None else self._replaced(entry)

    def _replaced(self, entry: Mapping[str, Any]) -> FourOverSixConfig:
        known = {field.name for field in dataclasses.fields(FourOverSixConfig)} - {"module_config_overrides"}
        return FourOverSixConfig(**{key: value for key, value in entry.items() if key in known})
