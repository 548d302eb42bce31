"""The method gptq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, PerLayer, Refusal, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_gptq.gptq"

_USUAL = {"bits": 4, "group_size": 128}
_SERVERS = ("vllm", "sglang")  # which have one kernel for it, of symmetric codes

BACKEND = Backend(
    method="gptq",
    config=f"{_MODULE}.config:GPTQConfig",
    quantizer=f"{_MODULE}.quantizer:GptqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="second-order rounding, 2 to 8 bits",
    needs_calibration=True,
    default=_USUAL,
    solver=f"{_MODULE}.shared:solve_block",
    example_configs=(
        _USUAL,
        {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
        {"bits": 8, "group_size": -1},
        {"bits": 3, "group_size": 64, "sym": False},
        {"bits": 5, "group_size": 32, "format": "gptq_p"},
        {"bits": 2, "group_size": 16},
    ),
    guide=Guide(
        purposes=("inference", "serving"),
        pros="The standard of calibrated integers, 2 to 8 bits; servers read 4 and 8 bits of it, symmetric.",
        cons="Needs data and minutes; the result can lean towards the calibration text.",
        paper="https://arxiv.org/abs/2210.17323",
        served_by={
            "vllm": "tested with vLLM 0.32: symmetric, 4 bits; by the source: 8 bits, on GPUs",
            "sglang": "by the source of SGLang 0.5.23: symmetric",
            "transformers": "tested with transformers 5.23 and gptqmodel 7.7",
        },
        refused=(
            *(Refusal(server, {"sym": (False,)}, {"sym": True}) for server in _SERVERS),
            *(Refusal(server, {"bits": (2, 3, 5, 6, 7)}, {"bits": 4}) for server in _SERVERS),
            Refusal("vllm", {"desc_act": (True,)}, {"desc_act": False}, unless={"group_size": (-1,)}),
            Refusal("vllm", {"dynamic.*.desc_act": (True,)}, {"desc_act": False}),
        ),
        calibration_seconds=40,
        calibration_gain=0.75,
    ),
    per_layer=PerLayer("dynamic", "+:^{regex}$", tuple({"bits": bits} for bits in (2, 3, 4, 8))),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """Files that AutoGPTQ wrote beside the weights name no method; none but its own keys tell."""
    has_bits = "bits" in config_dict or "wbits" in config_dict
    return "gptq" if has_bits and "desc_act" in config_dict and "zero_point" not in config_dict else None


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("gptq", f"{_MODULE}.decode:decoder_for")
