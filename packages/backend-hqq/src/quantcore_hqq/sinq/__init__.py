"""The method sinq: how quantcore finds its classes, and how folders of it are marked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, Refusal, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_hqq.sinq"
SIDECAR = "model.safetensors.index.json.meta.json"
MARKS = ("sinq", "is_sinq", "sinq_quantized", "sinq_version")
NAMING = ("quant_method", "quantization_method", "backend", "approach")

BACKEND = Backend(
    method="sinq",
    config=f"{_MODULE}.config:SinqConfig",
    quantizer=f"{_MODULE}.quantizer:SinqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="scales of rows and of columns by Sinkhorn's iteration, 1 to 8 bits, with or without data",
    example_configs=(
        {"nbits": 4, "group_size": 64},
        {"nbits": 8, "group_size": 128},
        {"nbits": 3, "group_size": 64, "tiling_mode": "2D"},
        {"nbits": 2, "group_size": 32},
        {"nbits": 4, "group_size": 64, "method": "sinq_nf4"},
        {"nbits": 5, "group_size": 64, "method": "sinq_hqq"},
    ),
    guide=Guide(
        purposes=("inference", "research"),
        pros="A scale for each column besides those of rows keeps outliers apart; no data, or little for `asinq`.",
        cons="The head is quantized too unless it is listed; only sinq itself and this package read it.",
        paper="https://arxiv.org/abs/2509.22944",
        served_by={"sinq": "tested with sinq 0.2: 3 and 4 bits"},
        refused=(Refusal("sinq", {"nbits": (8,)}, {"nbits": 4}),),  # what it saves so itself it does not load either
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """Dicts that name no method, but carry a mark of SINQ."""
    return BACKEND.method if _is_marked(config_dict) else None


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """Folders with a mark at the top of config.json or in its dict, or with the file that describes each layer."""
    found = config_json.get("quantization_config")
    described = dict(found) if isinstance(found, Mapping) else {}
    top = {key: value for key, value in config_json.items() if key in MARKS}
    if not (_is_marked(top) or _is_marked(described) or SIDECAR in side_files):
        return None
    listed = json.loads(side_files[SIDECAR]) if SIDECAR in side_files else {}
    return {**_settings_of(listed), **described, "quant_method": BACKEND.method}


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("sinq", f"{_MODULE}.decode:decoder_for")


def _is_marked(described: Mapping[str, Any]) -> bool:
    named = any(str(described.get(key, "")).lower() == BACKEND.method for key in NAMING)
    return named or any(described.get(key) for key in MARKS)


def _settings_of(listed: Any) -> dict[str, Any]:
    """Settings of the first layer that the file beside the weights describes, {} where it describes none."""
    entries = list(listed.values()) if isinstance(listed, Mapping) else []
    first = entries[0].get("meta") if entries and isinstance(entries[0], Mapping) else None
    meta: Mapping[str, Any] = first if isinstance(first, Mapping) else {}
    found = {key: meta[key] for key in ("nbits", "group_size", "method") if key in meta}
    is_square = isinstance(meta.get("scale.shape"), list) and len(meta["scale.shape"]) == 3
    return {**found, **({"tiling_mode": "2D"} if is_square else {}), "modules_to_not_convert": []}
