"""The method gptq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.plugins import Backend, hookimpl

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel

_MODULE = "quantcore_gptq.gptq"

BACKEND = Backend(
    method="gptq",
    config=f"{_MODULE}.config:GPTQConfig",
    quantizer=f"{_MODULE}.quantizer:GptqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="second-order rounding, 2 to 8 bits",
    needs_calibration=True,
    solver=f"{_MODULE}.shared:solve_block",
    example_configs=(
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
        {"bits": 8, "group_size": -1},
        {"bits": 3, "group_size": 64, "sym": False},
        {"bits": 5, "group_size": 32, "format": "gptq_p"},
        {"bits": 2, "group_size": 16},
    ),
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
    from quantcore.kernels.triton.kernels import kernels_for

    return kernels_for("gptq", f"{_MODULE}.decode:decoder_for")
