"""The method awq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, Refusal, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_gptq.awq"

_SERVERS = ("vllm", "sglang")
_OTHERS = ("gemv", "gemv_fast", "llm-awq", "marlin")  # layouts that servers do not know
_COMPILES = "test_skeletons_compile_with_the_decoder_and_spill_nothing"
_SPILLS = "ptxas keeps codes that are gathered in 128 registers there and spills 8 bytes; 8 warps would issue more"

BACKEND = Backend(
    method="awq",
    config=f"{_MODULE}.config:AwqConfig",
    quantizer=f"{_MODULE}.quantizer:AwqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="activation-aware scales, 4 bits in groups along in_features",
    example_configs=(
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 32, "zero_point": False},
        {"bits": 8, "group_size": 64},
        {"bits": 3, "group_size": 64},
        {"bits": 4, "group_size": 64, "version": "gemv"},
        {"bits": 4, "group_size": 128, "version": "gemv_fast"},
        {"bits": 4, "group_size": -1, "version": "llm-awq"},
    ),
    needs_calibration=True,
    gaps={f"{_COMPILES}[awq-*-3-sm_100]": _SPILLS},
    guide=Guide(
        purposes=("inference", "serving"),
        pros="4 bits close to float with a few calibration samples, and servers read them.",
        cons="Without data it rounds plainly; layers that share an input are scaled together, and have to be found.",
        paper="https://arxiv.org/abs/2306.00978",
        served_by={
            "vllm": "tested with vLLM 0.32: version gemm",
            "sglang": "by the source of SGLang 0.5.23: version gemm",
            "transformers": "by the source of transformers 5.23, with gptqmodel",
        },
        refused=(
            *(Refusal(server, {"bits": (2, 3, 5, 6, 7, 8)}, {"bits": 4}) for server in _SERVERS),
            *(Refusal(server, {"version": _OTHERS}, {"version": "gemm"}) for server in _SERVERS),
        ),
        calibration_seconds=200,
        calibration_gain=0.95,
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """Files that AutoAWQ wrote beside the weights name no method; none but its own keys tell."""
    has_bits = "bits" in config_dict or "w_bit" in config_dict
    return "awq" if has_bits and "zero_point" in config_dict and "version" in config_dict else None


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("awq", f"{_MODULE}.decode:decoder_for")
