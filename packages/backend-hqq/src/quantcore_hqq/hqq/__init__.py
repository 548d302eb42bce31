"""The method hqq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.plugins import Backend, hookimpl

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel

_MODULE = "quantcore_hqq.hqq"

BACKEND = Backend(
    method="hqq",
    config=f"{_MODULE}.config:HqqConfig",
    quantizer=f"{_MODULE}.quantizer:HqqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    upstream=f"{_MODULE}.upstream:linear",
    summary="half-quadratic zero points, 1 to 8 bits, no calibration",
    example_configs=(
        {"nbits": 4, "group_size": 64},
        {"nbits": 8, "group_size": 128},
        {"nbits": 3, "group_size": 64, "axis": 0},
        {"nbits": 2, "group_size": 16, "view_as_float": True},
        {"nbits": 1, "group_size": 32, "axis": 0},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.kernels.triton.kernels import kernels_for

    return kernels_for("hqq", f"{_MODULE}.decode:decoder_for")
