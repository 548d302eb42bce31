"""The method fouroversix: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.fouroversix"

_DECODES = "test_decoder_gives_the_numbers_of_the_format[fouroversix-*"
_ORDER = "the decoder multiplies the scales first, the format code and scale: the last bit of float32 differs"
_ROUNDED = "the format rounds sums to its output_type, the decoder's skeletons to the dtype of the input"

BACKEND = Backend(
    method="fouroversix",
    config=f"{_MODULE}.config:FourOverSixConfig",
    quantizer=f"{_MODULE}.quantizer:quantizer_for",
    summary="NVFP4 whose blocks reach up to 6 or to 4, whichever errs less; inputs are rounded alike",
    example_configs=({}, {"dtype": "mxfp4", "scale_rule": "static_6"}),
    gaps={
        f"{_DECODES}-0-dequantize]": _ORDER,
        f"{_DECODES}-0-dequantize_by_gathering]": _ORDER,
        f"{_DECODES}-0-dequantize_with_wide_indices]": _ORDER,
        f"{_DECODES}-0-dequantize_ragged_tiles]": _ORDER,
        f"{_DECODES}-gemv_of_1_row]": _ROUNDED,
        f"{_DECODES}-gemm]": _ROUNDED,
        f"{_DECODES}-gemm_in_float16]": _ROUNDED,
    },
    guide=Guide(
        purposes=("research",),
        pros="NVFP4 whose blocks reach up to 6 or to 4, whichever errs less: a smaller error for the same bytes.",
        cons="Inputs are rounded to 4 bits too; for speed it wants a GPU that multiplies FP4.",
        paper="https://arxiv.org/abs/2512.02010",
        served_by={
            "transformers": "by the source of transformers 5.23, with fouroversix",
            "fouroversix": "layers tested with the reference of fouroversix 1.0.5",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]
