"""The method gguf: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import Backend, Container, Guide, PerLayer, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.gguf"

BACKEND = Backend(
    method="gguf",
    config=f"{_MODULE}.config:GgufConfig",
    quantizer=f"{_MODULE}.quantizer:GgufQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="llama.cpp's files and block types, 1.6 to 8.5 bits, with or without an importance of columns",
    example_configs=(
        {"type": "Q4_K"},
        {"type": "Q8_0"},
        {"type": "Q6_K"},
        {"type": "Q2_K", "pure": True},
        {"type": "Q4_0"},
        {"type": "Q5_1"},
        {"type": "IQ4_XS"},
        {"type": "MXFP4"},
    ),
    guide=Guide(
        purposes=("inference", "smallest"),
        pros="One file with everything in it, for llama.cpp and what is built on it; good on CPUs.",
        cons="Architectures have to be known by name; the block types of 1 to 3 bits of the IQ family are only read.",
        paper="https://github.com/ggml-org/ggml",
        served_by={
            "llama.cpp": "tested with llama-cpp-python 0.3.36",
            "vllm": "with vllm-gguf-plugin",
            "sglang": "by the source of SGLang 0.5.23",
            "transformers": "by the source of transformers 5.23, with the package gguf",
        },
        file_suffix=".gguf",
    ),
    per_layer=PerLayer("types", "{name}", tuple({"type": f"Q{bits}_K"} for bits in (2, 3, 4, 5, 6)), value="type"),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_containers() -> Iterable[Container]:
    return [Container(".gguf", f"{_MODULE}.source:GgufSource", f"{_MODULE}.sink:GgufSink")]


def triton_kernels() -> list[Kernel]:
    """The Triton kernels of this method; triton is imported when a problem on a GPU is asked about."""
    from quantcore.sdk import kernels_for

    return kernels_for("gguf", f"{_MODULE}.decode:decoder_for")
