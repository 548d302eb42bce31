"""The native library through ctypes: its structs, its functions, and why it is not there where it is not."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import quantcore_cpu
from quantcore_cpu import settings

ABI = 2
FLOAT_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TYPES = {**FLOAT_TYPES, torch.uint8: 4}
PATHS = {"auto": 0, "dot": 1, "fma": 2, "pairs": 3}
INTEGER, TABLE, FLOAT = range(3)
BAD_SCRATCH = -5
_NAME = "libquantcore_cpu" + {"win32": ".dll"}.get(sys.platform, ".so")


class LibraryError(RuntimeError):
    """The library is not there, does not load, or refuses a call."""


class Weight(ctypes.Structure):
    """qcpu_weight of native/quantcore_cpu.h."""

    _fields_ = (
        *((name, c_int64) for name in ("size", "rows", "columns", "blocks", "padded", "group", "groups")),
        *((name, c_void_p) for name in ("codes", "scale", "zero", "levels", "small", "order", "row_of", "class_of")),
        *((name, c_void_p) for name in ("column_scale", "column_zero")),
        ("classes", c_int64),
        *((name, c_int32) for name in ("bits", "element", "scale_type", "zero_type")),
        *((name, c_int32) for name in ("float_exponent", "float_mantissa", "float_bias")),
        *((name, c_float) for name in ("zero_of_all", "small_zero", "small_unit")),
    )


class Product(ctypes.Structure):
    """qcpu_product."""

    _fields_ = (
        ("size", c_int64),
        *((name, c_void_p) for name in ("x", "y", "bias", "scratch")),
        *((name, c_int64) for name in ("scratch_bytes", "x_rows", "x_stride", "y_stride")),
        *((name, c_int32) for name in ("x_type", "y_type", "bias_type", "path", "rounded", "threads")),
    )


class Source(ctypes.Structure):
    """qcpu_source."""

    _fields_ = (
        *((name, c_int64) for name in ("size", "rows", "columns", "stride", "padded")),
        *((name, c_void_p) for name in ("codes", "order", "row_of")),
        ("blocks", c_int64),
        *((name, c_int32) for name in ("bits", "threads")),
    )


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "qcpu_abi": (c_int, []),
    "qcpu_available": (c_char_p, []),
    "qcpu_isa": (c_char_p, []),
    "qcpu_use": (c_int, [c_char_p]),
    "qcpu_threading": (c_char_p, []),
    "qcpu_message": (c_char_p, [c_int]),
    "qcpu_packed_bytes": (c_int64, [c_int64, c_int64, c_int]),
    "qcpu_pack": (c_int, [POINTER(Source), c_void_p]),
    "qcpu_unpack": (c_int, [POINTER(Source), c_void_p]),
    "qcpu_check": (c_int, [POINTER(Weight)]),
    "qcpu_path_of": (c_int, [POINTER(Weight), POINTER(Product)]),
    "qcpu_scratch": (c_int64, [POINTER(Weight), POINTER(Product)]),
    "qcpu_linear": (c_int, [POINTER(Weight), POINTER(Product)]),
    "qcpu_grouped": (c_int, [c_void_p, c_void_p, c_int64, POINTER(Product)]),
    "qcpu_grouped_scratch": (c_int64, [c_void_p, c_void_p, c_int64, POINTER(Product)]),
    "qcpu_dequantize": (c_int, [POINTER(Weight), c_void_p, c_int64, c_int64, c_void_p, c_int, c_int]),
}


def library() -> Any:
    """The loaded library. Raises LibraryError saying why there is none."""
    loaded, reason = _loaded()
    if loaded is None:
        raise LibraryError(reason)
    return loaded


def why_missing() -> str | None:
    """Why there is no library, or None."""
    return _loaded()[1]


def isa() -> str:
    """The instruction set in use."""
    return str(library().qcpu_isa().decode())


def available() -> list[str]:
    """Instruction sets that the library has and this processor runs, best first."""
    return str(library().qcpu_available().decode()).split()


def use(name: str | None) -> None:
    """Use an instruction set by name, or the best. Raises LibraryError for one that this processor does not run."""
    if library().qcpu_use(None if name is None else name.encode()) < 0:
        raise LibraryError(f"instruction set {name!r:.40} does not run here; one of {', '.join(available())}")


def check(status: int) -> int:
    """A status or size that is no failure. Raises LibraryError with what a failure means."""
    if status < 0:
        raise LibraryError(f"quantcore_cpu: {library().qcpu_message(status).decode()}")
    return status


@lru_cache(maxsize=1)
def _loaded() -> tuple[Any, str | None]:
    """The library, or None and the reason."""
    found = [folder / _NAME for folder in map(Path, quantcore_cpu.__path__) if (folder / _NAME).exists()]
    if not found:
        return None, (
            f"quantcore-kernels-cpu is installed without {_NAME}: it was built where no C++ compiler was found; "
            "install g++ or clang, and reinstall it"
        )
    try:
        loaded = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} does not load: {error}"
    if loaded.qcpu_abi() != ABI:
        return None, f"{found[0].name} has version {loaded.qcpu_abi()} of its interface, not {ABI}; reinstall it"
    return _with_isa(loaded, settings.forced_isa())


def _with_isa(loaded: Any, name: str | None) -> tuple[Any, str | None]:
    if name is None or loaded.qcpu_use(name.encode()) == 0:
        return loaded, None
    known = loaded.qcpu_available().decode().replace(" ", ", ")
    return None, f"QUANTCORE_CPU_ISA={name} does not run on this processor; one of {known}"
