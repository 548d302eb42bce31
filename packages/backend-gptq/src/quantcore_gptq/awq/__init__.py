"""The method awq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.kernels.triton.kernels import kernels_for

    return kernels_for("awq", f"{_MODULE}.decode:decoder_for")
