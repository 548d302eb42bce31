"""The method fp8: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl

_MODULE = "quantcore_fp8.fp8"

BACKEND = Backend(
    method="fp8",
    config=f"{_MODULE}.config:FineGrainedFP8Config",
    quantizer=f"{_MODULE}.quantizer:Fp8Quantizer",
    kernels=("quantcore_fp8.kernels:fp8_kernels",),
    summary="E4M3 in 128 x 128 blocks (DeepSeek, Qwen) or per tensor (Mistral, vLLM), inputs in E4M3 too",
    example_configs=(
        {"weight_block_size": [128, 128]},
        {"weight_block_size": [128, 128], "scale_fmt": "ue8m0", "fmt": "e4m3"},
        {"weight_block_size": None},
        {"weight_block_size": [64, 32], "modules_to_not_convert": ["lm_head"]},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
