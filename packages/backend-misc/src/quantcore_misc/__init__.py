"""Further methods for quantcore, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from quantcore.sdk import Backend, hookimpl

# A folder per row.
_METHODS = (
    "aqlm",
    "bitnet",
    "compressed_tensors",
    "eetq",
    "fouroversix",
    "fp_quant",
    "gemma",
    "gguf",
    "higgs",
    "metal",
    "modelopt",
    "mxfp4",
    "nvfp4",
    "quanto",
    "quark",
    "spqr",
    "torchao",
    "vptq",
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [import_module(f"{__name__}.{name}").BACKEND for name in _METHODS]
