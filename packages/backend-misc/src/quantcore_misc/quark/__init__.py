"""The method quark: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.quark"


def _example(**parts: dict[str, Any]) -> dict[str, Any]:
    return {"global_quant_config": {"input_tensors": None, "output_tensors": None, "bias": None, **parts}}


_GROUP_MX = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
_DYNAMIC = {"is_dynamic": True}
_CHANNEL_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True, "is_dynamic": False}
_TOKEN_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 1, "symmetric": True, "is_dynamic": True}
_GROUP_UINT4 = {"dtype": "uint4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "symmetric": False}
_GROUP_INT4 = {"dtype": "int4", "qscheme": "per_group", "group_size": 64, "ch_axis": -1, "symmetric": True}

BACKEND = Backend(
    method="quark",
    config=f"{_MODULE}.config:QuarkConfig",
    quantizer=f"{_MODULE}.quantizer:QuarkQuantizer",
    kernels=(f"{_MODULE}:triton_kernels",),
    summary="AMD Quark exports: FP8, int8, int4, OCP MX and FP4",
    example_configs=(
        _example(weight=_CHANNEL_FP8, input_tensors=_TOKEN_FP8),
        _example(weight=_GROUP_UINT4),
        _example(weight=_GROUP_INT4),
        _example(weight=_GROUP_MX),
        _example(
            weight={**_GROUP_MX, "dtype": "fp6_e2m3"}, input_tensors={**_GROUP_MX, "dtype": "fp6_e2m3", **_DYNAMIC}
        ),
    ),
    guide=Guide(
        purposes=("serving",),
        pros="AMD's exports: FP8, int8, int4 and OCP MX, inputs rounded as they were measured.",
        cons="Made for AMD GPUs; most settings come from Quark's own calibration.",
        served_by={
            "vllm": "by the source of vLLM 0.32",
            "sglang": "by the source of SGLang 0.5.23",
            "transformers": "by the source of transformers 5.23, with amd-quark",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def triton_kernels() -> list[Kernel]:
    """The products of 8-bit codes by 8-bit codes; the core has kernels for all else."""
    from quantcore_misc.products import product_kernels
    from quantcore_misc.quark.weight import codes_of

    return product_kernels("quark", codes_of)
