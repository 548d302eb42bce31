"""The method fp_quant: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.fp_quant"

_DECODES = "test_decoder_gives_the_numbers_of_the_format[fp_quant-*-0"
_ORDER = "the decoder multiplies the scales first, the format code and scale: the last bit of float32 differs"

BACKEND = Backend(
    method="fp_quant",
    config=f"{_MODULE}.config:FPQuantConfig",
    quantizer=f"{_MODULE}.quantizer:quantizer_for",
    summary="MXFP4 and NVFP4 weights and inputs under a rotation of 16 to 128 columns",
    example_configs=({"hadamard_group_size": 16}, {"forward_dtype": "mxfp4", "hadamard_group_size": 32}),
    gaps={
        f"{_DECODES}-dequantize]": _ORDER,
        f"{_DECODES}-dequantize_by_gathering]": _ORDER,
        f"{_DECODES}-dequantize_with_wide_indices]": _ORDER,
    },
    guide=Guide(
        purposes=("research",),
        pros="4-bit floats for weights and inputs, after a rotation that spreads what lies far out; it can be trained.",
        cons="Inputs are rounded to 4 bits too; for speed it wants a GPU that multiplies FP4.",
        paper="https://arxiv.org/abs/2509.23202",
        served_by={
            "vllm": "with --allow-deprecated-quantization",
            "transformers": "by the source of transformers 5.23, with fp_quant",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
