"""The method bitnet: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.bitnet"

BACKEND = Backend(
    method="bitnet",
    config=f"{_MODULE}.config:BitNetQuantConfig",
    quantizer=f"{_MODULE}.quantizer:quantizer_for",
    summary="ternary weights under one scale, inputs of 8 bits, for models trained that way",
    example_configs=({"linear_class": "bitlinear"},),
    guide=Guide(
        purposes=("research",),
        pros="Ternary weights and 8-bit inputs: an eighth of the memory of float16.",
        cons="Only for models that were trained this way; rounding an ordinary model to it destroys it.",
        paper="https://arxiv.org/abs/2402.17764",
        served_by={"transformers": "tested with transformers 5.23"},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
