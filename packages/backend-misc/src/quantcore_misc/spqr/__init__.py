"""The method spqr: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.spqr"
_COMPILES = "test_skeletons_compile_with_the_decoder_and_spill_nothing"
_SPILLS = "a product of one row spills 8 bytes there, of codes that are gathered"

BACKEND = Backend(
    method="spqr",
    config=f"{_MODULE}.config:SpQRConfig",
    quantizer=f"{_MODULE}.quantizer:SpqrQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="3 bits under scales of 3 bits, and sparse outliers in float16, chosen with calibration data",
    needs_calibration=True,
    gaps={f"{_COMPILES}[spqr-*-0-sm_90]": _SPILLS},
    guide=Guide(
        purposes=("research",),
        pros="Close to lossless at 4 to 5 bits: outliers stay sparse beside 3-bit weights.",
        cons="Needs data; more bits than its name tells; sparse products are slow without a kernel.",
        paper="https://arxiv.org/abs/2306.03078",
        served_by={"transformers": "by the source of transformers 5.23, with spqr_quant"},
        calibration_seconds=60,
        calibration_gain=0.78,
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("spqr", f"{_MODULE}.decode:decoder_for")
