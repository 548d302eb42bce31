"""The method metal, and the files of MLX: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantcore.sdk import Backend, Guide, Refusal, hookimpl

_MODULE = "quantcore_misc.metal"
_OF_MLX = {"group_size", "bits", "mode"}
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_COMPILES = "test_skeletons_compile_with_the_decoder_and_spill_nothing"
_SPILLS = "ptxas keeps codes that are gathered in 96 registers there and spills 4 bytes; 8 warps would issue more"

BACKEND = Backend(
    method="metal",
    config=f"{_MODULE}.config:MetalConfig",
    quantizer=f"{_MODULE}.quantizer:MetalQuantizer",
    summary="groups with a scale and an offset in MLX's words, 2 to 8 bits, without data",
    example_configs=(
        {"bits": 4, "group_size": 64},
        {"bits": 8, "group_size": 128},
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": 64, "mode": "affine"},
        {"bits": 6, "group_size": 32, "mode": "affine"},
    ),
    gaps={f"{_COMPILES}[metal-*-3-sm_100]": _SPILLS},
    guide=Guide(
        purposes=("inference",),
        pros="The layout of Apple's MLX, 2 to 8 bits, without data.",
        cons="Plain rounding by groups: at 2 and 3 bits hqq or a calibrated method is better.",
        served_by={
            "mlx": "tested with mlx 0.32 and mlx-lm 0.32: with a mode",
            "transformers": "by the source of transformers 5.23: without a mode, on Apple's GPUs",
        },
        refused=(Refusal("transformers", {"mode": ()}, {"mode": None}),),
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """MLX's dicts hold bits, group_size and a mode, and dicts or false for single layers."""
    own = {key for key, value in config_dict.items() if not isinstance(value, dict | bool)}
    is_mlx = {"group_size", "bits"} <= own <= _OF_MLX and config_dict.get("mode", "affine") in _MODES
    return BACKEND.method if is_mlx else None


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """MLX writes its dict under "quantization"."""
    found = config_json.get("quantization")
    if not isinstance(found, Mapping) or quantcore_match_config(found) is None:
        return None
    return {**found, "mode": found.get("mode", "affine"), "quant_method": BACKEND.method}
