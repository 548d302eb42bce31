"""The method mxfp8: the classes of fp8 with a power of two for each 32 columns of a row."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

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
    guide=Guide(
        purposes=("serving", "inference"),
        pros="8-bit floats under a power of two for 32 weights: close to lossless without data.",
        cons="8.25 bits; for speed it wants a GPU with block scales.",
        paper="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
        served_by={
            "sglang": "by the source of SGLang 0.5.23, on GPUs that multiply MXFP8",
            "transformers": "by the source of transformers 5.23; on a CPU tested with dequantize",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
