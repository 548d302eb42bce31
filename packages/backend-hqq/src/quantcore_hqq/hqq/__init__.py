"""The method hqq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, PerLayer, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

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
    guide=Guide(
        purposes=("inference", "smallest", "fine-tuning"),
        pros="1 to 8 bits without data, in seconds, better than plain rounding.",
        cons="Below 3 bits calibrated methods are better; few servers read it.",
        paper="https://mobiusml.github.io/hqq_blog/",
        served_by={"transformers": "tested with transformers 5.23 and hqq 0.2.8"},
    ),
    per_layer=PerLayer(
        "quant_config",
        "{kind}",
        tuple({"weight_quant_params": {"nbits": bits}} for bits in (1, 2, 3, 4, 8)),
        merges=True,
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("hqq", f"{_MODULE}.decode:decoder_for")
