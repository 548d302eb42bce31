"""The method eetq: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.eetq"

BACKEND = Backend(
    method="eetq",
    config=f"{_MODULE}.config:EetqConfig",
    quantizer=f"{_MODULE}.quantizer:EetqQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="int8 by rows, in the interleaved layout of EETQ's GPU kernels, without data",
    guide=Guide(
        purposes=("inference",),
        pros="8 bits by rows, close to lossless, without data or settings.",
        cons="Half the memory and no less; files are in the interleaved layout of one family of GPUs.",
        served_by={"transformers": "by the source of transformers 5.23, with kernels, on GPUs"},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("eetq", f"{_MODULE}.decode:decoder_for")
