"""The method mxfp8: the classes of fp8 with a power of two for each 32 columns of a row."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl

_MODULE = "quantcore_fp8.fp8"

BACKEND = Backend(
    method="mxfp8",
    config=f"{_MODULE}.config:FineGrainedFP8Config",
    quantizer=f"{_MODULE}.quantizer:Fp8Quantizer",
    kernels=("quantcore_fp8.kernels:fp8_kernels",),
    summary="E4M3 with one power-of-two scale for 32 weights (OCP MX), inputs the same",
    example_configs=(
        {"weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        {"weight_block_size": [1, 32]},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
