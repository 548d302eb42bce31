"""The method nvfp4: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.nvfp4"

BACKEND = Backend(
    method="nvfp4",
    config=f"{_MODULE}.config:NVFP4Config",
    quantizer=f"{_MODULE}.quantizer:NvFp4Quantizer",
    summary="FP4 in blocks of 16 under FP8 scales, saved in the layout of Model Optimizer, without data",
    guide=Guide(
        purposes=("inference", "serving"),
        pros="4-bit floats under FP8 scales for 16 weights: the finest 4-bit format that hardware multiplies.",
        cons="4.5 bits; for speed it wants a GPU with FP4.",
        served_by={"model-optimizer": "layers tested with Model Optimizer 0.47"},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
