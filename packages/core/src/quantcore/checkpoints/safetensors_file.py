"""One safetensors file: its header, checked, and its tensors read and written one by one.

The safetensors library maps a whole file into memory to look at it, which counts against a limit on address space and
keeps pages resident. Source of the layout: https://github.com/huggingface/safetensors, README, section Format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.checkpoints.folder import HeldFile, ReplacedError
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError
from quantcore.formats.base import dtype_name

_SAFETENSORS_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",  # since torch 2.7
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
# In which the library writes tensors, by dtype: later ones of its own list first.
_WRITTEN = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_NAMES = {torch_name: name for name, torch_name in _SAFETENSORS_DTYPES.items()}
FORMAT = {"format": "pt"}  # what the metadata of a file says unless a method says otherwise
ALIGNMENT = 8  # bytes; readers view a tensor's bytes in place, so its offset must be a multiple of its itemsize
_POINTER = b"version https://git-lfs"  # how the file begins that stands for one that was not downloaded
_MOST_HEADER = 100_000_000  # bytes; the library refuses more


def read_headers(file: HeldFile) -> tuple[dict[str, Header], dict[str, str]]:
    """The header of each tensor of a file, by name, and the metadata that the file has of its own.

    Raises CheckpointError naming the file when it is no safetensors file, is truncated, holds bytes that no tensor
    owns or two own, or a dtype that torch lacks.
    """
    path = file.path
    try:
        entries, start = _read_entries(file)
        metadata = _metadata(entries.pop("__metadata__", None))
        _check_layout(entries, file.size - start)
    except ValueError as error:
        if file.read(0, len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights; run git lfs pull there") from error
        raise CheckpointError(f"{path}: truncated or not safetensors ({error}); download or write it again") from error
    headers = {
        name: Header(
            path.name, _dtype(entry["dtype"], path, name), tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        for name, entry in entries.items()
    }
    return headers, metadata


def read_tensors(file: HeldFile, headers: Mapping[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for some headers of a file, in the file's order; each tensor owns its memory.

    Raises ReplacedError when the file has changed since its headers were read.
    """
    for name, header in sorted(headers.items(), key=lambda item: item[1].offset):
        tensor = torch.empty(header.shape, dtype=header.dtype, device="cpu")
        view = tensor.view(-1).view(torch.uint8).numpy().data
        if file.read_into(view, header.offset) != header.nbytes:
            raise ReplacedError(f"{file.path}: ends within {name}; the file changed or is damaged, download it again")
        file.check_unchanged()
        del view
        yield name, tensor
        del tensor  # it may be given back before the next one is read


def entry_of(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    """What a header says of a tensor whose bytes begin at start. Raises ValueError for a dtype that files lack."""
    offsets = [start, start + tensor.nbytes]
    return {"dtype": stored_dtype(name, tensor.dtype), "shape": list(tensor.shape), "data_offsets": offsets}


def stored_dtype(tensor: str, dtype: torch.dtype) -> str:
    """The name of a dtype in files. Raises ValueError naming the tensor where they have none."""
    name = _NAMES.get(dtype_name(dtype))
    if name is None:
        raise ValueError(f"{tensor}: safetensors has no dtype {dtype_name(dtype)}; cast it before saving")
    return name


def place_of_dtype(tensor: str, dtype: torch.dtype) -> int:
    """Where tensors of a dtype stand in a file of the library. Raises ValueError as `stored_dtype`."""
    return _WRITTEN.index(stored_dtype(tensor, dtype))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any device and strides, row-major; its own memory where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one element, for which any stride counts as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def write_all(stream: RawIOBase, content: bytes | memoryview) -> None:
    """Write everything to an unbuffered stream. Raises OSError naming the file."""
    view = memoryview(content)
    try:
        while view:
            view = view[stream.write(view) or 0 :]
    except OSError as error:
        path = Path(stream.name)  # type: ignore[attr-defined]
        where = path.parent.parent
        raise OSError(f"{path.name}: cannot be written: {error}; is there space in {where}?") from error


def _read_entries(file: HeldFile) -> tuple[dict[str, Any], int]:
    """The entries of the header, and where the bytes of the tensors begin. Raises ValueError when it is no header."""
    prefix = file.read(0, 8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MOST_HEADER, file.size - 8):
        raise ValueError("the header is longer than the file")
    try:
        entries = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    return entries, 8 + length


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("the metadata of the header is no object of strings")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header names a tensor twice")
    return found


def _check_layout(entries: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors fill size bytes in turn, without gap or overlap."""
    for name, entry in entries.items():
        if not _is_entry(entry):
            raise ValueError(f"the entry of {name!r:.100} lacks a dtype, a shape or offsets")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        dtype = _torch_dtype(entry["dtype"])
        expected = None if dtype is None else math.prod(entry["shape"]) * dtype.itemsize
        if first != end or last < first or (expected is not None and last - first != expected):
            raise ValueError(f"the bytes [{first}, {last}) of {name!r:.100} contradict its shape or its neighbours")
        end = last
    if end != size:
        raise ValueError(f"tensors take {end} bytes, the file holds {size}")


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = (entry.get("shape"), entry.get("data_offsets"))
    if not all(isinstance(part, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in part) for part in numbers):
        return False
    return len(entry["data_offsets"]) == 2


def _dtype(name: str, path: Path, tensor: str) -> torch.dtype:
    dtype = _torch_dtype(name)
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {tensor} has dtype {name}, which torch cannot hold; convert it first")
    return dtype


def _torch_dtype(name: str) -> torch.dtype | None:
    dtype = getattr(torch, _SAFETENSORS_DTYPES.get(name, ""), None)
    return dtype if isinstance(dtype, torch.dtype) else None
