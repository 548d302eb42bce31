"""The method modelopt: how quantcore finds its classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.modelopt"
CONFIG_FILE = "hf_quant_config.json"

BACKEND = Backend(
    method="modelopt",
    config=f"{_MODULE}.config:ModelOptConfig",
    quantizer=f"{_MODULE}.quantizer:ModelOptQuantizer",
    summary="files of NVIDIA's Model Optimizer: NVFP4 with float or rounded inputs, MXFP8, FP8",
    example_configs=({"quant_algo": "W4A16_NVFP4"}, {"quant_algo": "MXFP8"}),
    guide=Guide(
        purposes=("serving",),
        pros="The files that NVIDIA publishes: NVFP4 and FP8 with measured ranges.",
        cons="For speed it wants a GPU with FP4 or FP8; measured ranges need data.",
        paper="https://github.com/NVIDIA/Model-Optimizer",
        served_by={
            "vllm": "by the source of vLLM 0.32",
            "sglang": "by the source of SGLang 0.5.23",
            "model-optimizer": "layers tested with Model Optimizer 0.47",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """Exports before version 0.29 have a file of their own, and nothing in config.json."""
    if CONFIG_FILE not in side_files:
        return None
    described = json.loads(side_files[CONFIG_FILE])
    found = described.get("quantization") if isinstance(described, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    values = {"ignore" if key == "exclude_modules" else key: value for key, value in found.items()}
    return {**values, "producer": described.get("producer"), "quant_method": BACKEND.method}
