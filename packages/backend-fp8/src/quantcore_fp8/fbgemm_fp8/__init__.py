"""The method fbgemm_fp8: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_fp8.fbgemm_fp8"

BACKEND = Backend(
    method="fbgemm_fp8",
    config=f"{_MODULE}.config:FbgemmFp8Config",
    quantizer=f"{_MODULE}.quantizer:FbgemmFp8Quantizer",
    kernels=("quantcore_fp8.kernels:fp8_kernels",),
    summary="E4M3 with one scale for each row, inputs in E4M3 per token below an upper bound",
    example_configs=({}, {"activation_scale_ub": 50.0}),
    guide=Guide(
        purposes=("serving",),
        pros="FP8 weights and inputs with a scale for each row: what the 405B Llama was published in.",
        cons="8 bits; for speed it wants a GPU with FP8.",
        paper="https://arxiv.org/abs/2407.21783",
        served_by={
            "vllm": "with --allow-deprecated-quantization",
            "transformers": "by the source of transformers 5.23, on GPUs",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
