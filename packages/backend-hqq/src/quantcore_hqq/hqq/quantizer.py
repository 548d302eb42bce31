"""The quantizer of HQQ."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantcore.sdk import WeightQuantizer, dtype_name, weight_dtype
from quantcore_hqq.hqq.config import HqqConfig
from quantcore_hqq.hqq.format import Hqq


class HqqQuantizer(WeightQuantizer):
    """Settings by layer tag; the compute dtype is that of the float weight."""

    quantization_config: HqqConfig

    @property
    def skip_patterns(self) -> list[str] | None:
        return self.quantization_config.skip_modules

    def skips(self, name: str, pattern: str) -> bool:
        """HQQ's rule: the pattern stands anywhere in the name."""
        return pattern in name

    def format_for(self, name: str, module: nn.Module) -> Hqq | None:
        settings = _settings_for(name, self.quantization_config.by_tag())
        return None if settings is None else _format(settings["weight_quant_params"], module)

    def fallback_format(self, name: str, module: nn.Module) -> Hqq:
        """Any: a stored layer describes itself, whatever the config says."""
        return Hqq()


def layer_tag(name: str) -> str:
    """A module's path without `model`, `layers` and numbers: "model.layers.3.mlp.up_proj" -> "mlp.up_proj"."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _settings_for(name: str, by_tag: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    tag = layer_tag(name)
    last_two = ".".join(name.split(".")[-2:])  # all that transformers 4.57 looks up
    return next((by_tag[key] for key in ("", tag, last_two) if key in by_tag), None)


def _format(weight: dict[str, Any], module: nn.Module) -> Hqq:
    bits = weight["nbits"]
    return Hqq(
        bits=bits if bits == 1.58 else int(bits),
        group_size=weight.get("group_size", 64),
        axis=weight.get("axis", 1),
        compute_dtype=dtype_name(weight_dtype(module)),
        view_as_float=weight.get("view_as_float", False),
        channel_wise=weight.get("channel_wise", True),
        optimize=weight.get("optimize", True),
        round_zero=weight.get("round_zero", bits == 4),
    )
