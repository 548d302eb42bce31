"""The method compressed-tensors: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Guide, PerLayer, Refusal, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.compressed_tensors"
_SPARSE = ("sparse-bitmask", "sparse-24-bitmask")

BACKEND = Backend(
    method="compressed-tensors",
    config=f"{_MODULE}.config:CompressedTensorsConfig",
    quantizer=f"{_MODULE}.quantizer:CompressedTensorsQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="the formats of llm-compressor and vLLM: int2 to int8, FP8, NVFP4, MXFP4, sparse",
    default={"scheme": "W4A16"},
    example_configs=(
        {"scheme": "W4A16"},
        {"scheme": "W8A8"},
        {"scheme": "FP8_DYNAMIC"},
        {"scheme": "NVFP4A16"},
        {"scheme": "MXFP8"},
        {"scheme": "MXFP6A16"},
        {"scheme": "W4A16_ASYM"},
    ),
    guide=Guide(
        purposes=("serving", "inference"),
        pros="One file format for W4A16, W8A8, FP8, NVFP4 and more, which servers read as it is.",
        cons="Many settings: start from a scheme; a scheme that rounds inputs statically needs data.",
        served_by={
            "vllm": "tested with vLLM 0.32: W4A16, W4A16_ASYM, W8A8, FP8_DYNAMIC, FP8_BLOCK; on a CPU no W8A16",
            "sglang": "by the source of SGLang 0.5.23",
            "transformers": "tested with transformers 5.23 and compressed-tensors 0.20",
        },
        refused=(
            Refusal("vllm", {"config_groups.*.weights.actorder": ("group", "dynamic")}, {"actorder": "weight"}),
            Refusal("vllm", {"sparsity_config.format": _SPARSE}, {"sparsity_config": None}),
        ),
    ),
    per_layer=PerLayer(
        "config_groups", "{name}", tuple({"weights": {"num_bits": bits}} for bits in (2, 3, 4, 8)), targets="targets"
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The products of 8-bit codes by 8-bit codes; the core has kernels for all else."""
    from quantcore_misc.compressed_tensors.plain import codes_of
    from quantcore_misc.products import product_kernels

    return product_kernels("compressed_tensors", codes_of)
