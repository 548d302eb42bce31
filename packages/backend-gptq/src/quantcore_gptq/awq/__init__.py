"""The method awq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from quantcore.plugins import Backend, hookimpl

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel

_MODULE = "quantcore_gptq.awq"

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
    from quantcore.kernels.triton.kernels import kernels_for

    return kernels_for("awq", f"{_MODULE}.decode:decoder_for")
