"""The method bitsandbytes: how quantcore finds its classes, and how configs without a method name are recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_bnb.bitsandbytes"

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}

BACKEND = Backend(
    method="bitsandbytes",
    config=f"{_MODULE}.config:BitsAndBytesConfig",
    quantizer=f"{_MODULE}.quantizer:quantizer_for",
    kernels=(f"{_MODULE}:triton_kernels",),
    upstream=f"{_MODULE}.upstream:linear",
    summary="NF4 and FP4 with double quantization, LLM.int8",
    default=_NF4,
    example_configs=(
        _NF4,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "float16"},
        {"load_in_8bit": True},
    ),
    guide=Guide(
        purposes=("inference", "fine-tuning"),
        pros="No data, seconds to quantize, on the fly while a model loads; what QLoRA was made with.",
        cons="Slower than group-wise integers at many rows; LLM.int8 keeps outlier columns in float at run time.",
        paper="https://arxiv.org/abs/2305.14314",
        served_by={
            "vllm": "with vllm-bnb-plugin",
            "sglang": "by the source of SGLang 0.5.23",
            "transformers": "tested with transformers 5.23 and bitsandbytes 0.50",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """Files older than transformers 4.38 name no method, only a flag."""
    return BACKEND.method if config_dict.get("load_in_4bit") or config_dict.get("load_in_8bit") else None


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("bitsandbytes", f"{_MODULE}.decode:decoder_for")
