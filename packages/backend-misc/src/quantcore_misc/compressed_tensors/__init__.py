"""The method compressed-tensors: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.plugins import Backend, hookimpl

if TYPE_CHECKING:
    from quantcore.kernels.dispatch import Kernel

_MODULE = "quantcore_misc.compressed_tensors"

BACKEND = Backend(
    method="compressed-tensors",
    config=f"{_MODULE}.config:CompressedTensorsConfig",
    quantizer=f"{_MODULE}.quantizer:CompressedTensorsQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="the formats of llm-compressor and vLLM: int2 to int8, FP8, NVFP4, MXFP4, sparse",
    example_configs=(
        {"scheme": "W4A16"},
        {"scheme": "W8A8"},
        {"scheme": "FP8_DYNAMIC"},
        {"scheme": "NVFP4A16"},
        {"scheme": "MXFP8"},
        {"scheme": "MXFP6A16"},
        {"scheme": "W4A16_ASYM"},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The GPU kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.kernels.triton.kernels import kernels_for
    from quantcore_misc.compressed_tensors.plain import codes_of
    from quantcore_misc.products import product_kernels

    label = "compressed_tensors"
    return [*product_kernels(label, codes_of), *kernels_for(label, f"{_MODULE}.decode:decoder_for")]
