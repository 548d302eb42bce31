"""The method mxfp4: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.mxfp4"

BACKEND = Backend(
    method="mxfp4",
    config=f"{_MODULE}.config:Mxfp4Config",
    quantizer=f"{_MODULE}.quantizer:MxFp4Quantizer",
    summary="FP4 in blocks of 32 under powers of two, without data: the experts of gpt-oss, or linear layers",
    guide=Guide(
        purposes=("inference", "serving"),
        pros="The form in which gpt-oss is published: experts of 4.25 bits.",
        cons="A power of two for 32 weights is a coarse scale: models not trained for it lose more than with nvfp4.",
        paper="https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
        served_by={
            "vllm": "by the source of vLLM 0.32: gpt-oss",
            "sglang": "by the source of SGLang 0.5.23: gpt-oss",
            "transformers": "by the source of transformers 5.23: gpt-oss; on a CPU with dequantize",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
