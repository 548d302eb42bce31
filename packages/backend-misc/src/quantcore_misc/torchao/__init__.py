"""The method torchao: how quantcore finds its classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from quantcore.sdk import Backend, Guide, hookimpl
from quantcore_misc.torchao.kinds import (
    FLOAT8_ROUNDED,
    INT4,
    INT8,
    INT8_ROUNDED,
    INTX,
    INTX_ROUNDED,
    KINDS,
    MX_ROUNDED,
    NVFP4,
)
from quantcore_misc.torchao.words import described, dtype_word, member

if TYPE_CHECKING:
    from quantcore.sdk import Kernel

_MODULE = "quantcore_misc.torchao"


def _example(kind: str, **fields: Any) -> dict[str, Any]:
    known = KINDS[kind]
    return {"quant_type": {"default": described(kind, {**known.fields, **fields}, known.version)}}


_ROW, _GROUP = described("PerRow", {"dim": -1}), described("PerGroup", {"group_size": 32})
_ASYMMETRIC = member("MappingType", "ASYMMETRIC")

BACKEND = Backend(
    method="torchao",
    config=f"{_MODULE}.config:TorchAoConfig",
    quantizer=f"{_MODULE}.quantizer:TorchAoQuantizer",
    kernels=(f"{_MODULE}:product_kernels",),
    pickled={"torchao.": f"{_MODULE}.pickled:stored_tensors"},
    summary="int8, int4, intx, float8, NVFP4 and MX layouts of torchao, with rounded inputs or without",
    example_configs=(
        _example(INT8),
        _example(INT8_ROUNDED),
        _example(INT4, group_size=32),
        _example(FLOAT8_ROUNDED, granularity=[_ROW, _ROW]),
        _example(INTX, weight_dtype=dtype_word("int3"), granularity=_GROUP, mapping_type=_ASYMMETRIC),
        _example(INTX_ROUNDED, weight_dtype=dtype_word("int4")),
        _example(NVFP4),
        _example(MX_ROUNDED),
    ),
    default={"quant_type": INT8},
    guide=Guide(
        purposes=("inference", "serving"),
        pros="int8, float8 and int4 as PyTorch's own library has them, inputs rounded too, without data.",
        cons="Plain rounding: at 4 bits hqq and the calibrated methods are better at the same size.",
        served_by={
            "transformers": "tested with transformers 5.23 and torchao 0.18",
            "vllm": "with torchao of the version that the header is of",
        },
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


def product_kernels() -> list[Kernel]:
    """The products of 8-bit codes by 8-bit codes; the core has kernels for all else."""
    from quantcore_misc import products
    from quantcore_misc.torchao.format import codes_of

    return products.product_kernels("torchao", codes_of)
