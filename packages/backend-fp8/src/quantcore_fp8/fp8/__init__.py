"""The method fp8: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, Refusal, hookimpl

_MODULE = "quantcore_fp8.fp8"

_SERVERS = ("vllm", "sglang")
_PER_TENSOR, _NAMES = {"weight_block_size": (None,)}, {"ignored_layers": None}

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
    guide=Guide(
        purposes=("serving", "inference"),
        pros="Close to lossless without data, for inputs too; GPUs with FP8 multiply it as it is.",
        cons="8 bits; older GPUs and CPUs compute from decoded weights.",
        paper="https://arxiv.org/abs/2412.19437",
        served_by={
            "vllm": "tested with vLLM 0.32: 128 x 128 blocks; by the source: per tensor, on GPUs",
            "sglang": "by the source of SGLang 0.5.23: 128 x 128 blocks; per tensor as for vllm",
            "transformers": "by the source of transformers 5.23; on a CPU tested with dequantize",
        },
        refused=(
            # One scale for the tensor has another name in their files, which the key ignored_layers tells.
            *(Refusal(name, _PER_TENSOR, _NAMES, unless={"ignored_layers": ()}, renames=True) for name in _SERVERS),
            Refusal("transformers", {**_PER_TENSOR, "ignored_layers": ()}, {"modules_to_not_convert": "these names"}),
            *(Refusal(name, {"expert_dtype": ("fp4",)}, {"expert_dtype": "fp8"}) for name in _SERVERS),
        ),
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
