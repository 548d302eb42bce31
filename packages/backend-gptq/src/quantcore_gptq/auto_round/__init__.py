"""The method auto-round: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.plugins import Backend, hookimpl

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel

_MODULE = "quantcore_gptq.auto_round"

BACKEND = Backend(
    method="auto-round",
    config=f"{_MODULE}.config:AutoRoundConfig",
    quantizer=f"{_MODULE}.quantizer:AutoRoundQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="signed-gradient rounding, 2 to 8 bits",
    needs_calibration=True,
    example_configs=(
        {"bits": 4, "group_size": 128},
        {"bits": 4, "group_size": 32, "sym": False, "packing_format": "auto_round:auto_awq"},
        {"bits": 3, "group_size": 64, "sym": False, "packing_format": "auto_round"},
        {"bits": 2, "group_size": 32},
        {"bits": 6, "group_size": 32},
        {"bits": 8, "group_size": -1},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.kernels.triton.kernels import kernels_for

    return kernels_for("auto_round", f"{_MODULE}.decode:decoder_for")
