"""The method gemma: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.gemma"

_DECODES = "test_decoder_gives_the_numbers_of_the_format[gemma-*"
_SCALE = "the format rounds scales to the dtype asked for, the decoder the product alone: the last bit differs"

BACKEND = Backend(
    method="gemma",
    config=f"{_MODULE}.config:GemmaQuantizationConfig",
    quantizer=f"{_MODULE}.quantizer:GemmaQuantizer",
    summary="integers of 2, 4 or 8 bits by module, embeddings too, as Google's Gemma files have them",
    example_configs=({"num_bits": 4}, {"num_bits": 8}, {"num_bits": 2}),
    gaps={
        f"{_DECODES}-0-dequantize_to_bfloat16]": _SCALE,
        f"{_DECODES}-1-dequantize_to_bfloat16]": _SCALE,
        f"{_DECODES}-0-dequantize_in_float16]": _SCALE,
        f"{_DECODES}-1-dequantize_in_float16]": _SCALE,
    },
    guide=Guide(
        purposes=("inference",),
        pros="Google's own integers of 2, 4 and 8 bits by module, embeddings too.",
        cons="For Gemma's files; other architectures gain nothing over hqq or gptq.",
        served_by={"transformers": "tested with transformers 5.23"},
        architectures=("gemma",),
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
