"""One safetensors file: its header, checked, and its tensors read and written one by one.

The safetensors library maps a whole file into memory to look at it, which counts against a limit on address space and
keeps pages resident. Source of the layout: https://github.com/huggingface/safetensors, README, section Format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
_NAMES = {torch_name: name for name, torch_name in _SAFETENSORS_DTYPES.items()}
# The order in which the library writes dtypes: widest first, so that each tensor is aligned.
_WRITTEN = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
METADATA = {"__metadata__": {"format": "pt"}}
ALIGNMENT = 8  # bytes; readers view a tensor's bytes in place, so its offset must be a multiple of its itemsize
_MOST_HEADER = 100_000_000  # bytes; the library refuses more


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor before its bytes are read. offset: of the first byte in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_headers(path: Path) -> dict[str, Header]:
    """The header of each tensor of a file, by name.

    Raises CheckpointError naming the file when it is no safetensors file, is truncated, holds bytes that no tensor
    owns or two own, or a dtype that torch lacks.
    """
    try:
        entries, start = _read_entries(path)
        _check_layout(entries, path.stat().st_size - start)
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or not safetensors ({error}); download or write it again") from error
    return {
        name: Header(
            path.name, _dtype(entry["dtype"], path, name), tuple(entry["shape"]), start + entry["data_offsets"][0]
        )
        for name, entry in entries.items()
    }


def read_tensors(path: Path, headers: Mapping[str, Header]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for some headers of a file, in the file's order; each tensor owns its memory.

    Raises CheckpointError when the file has become shorter since its headers were read.
    """
    with path.open("rb") as stream:
        for name, header in sorted(headers.items(), key=lambda item: item[1].offset):
            tensor = torch.empty(header.shape, dtype=header.dtype, device="cpu")
            stream.seek(header.offset)
            if stream.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != header.nbytes:
                raise CheckpointError(f"{path}: ends within {name}; the file changed or is damaged, download it again")
            yield name, tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file with the bytes that the safetensors library gives it; of tensors elsewhere, one is on the CPU."""
    order = sorted(tensors, key=lambda name: (_WRITTEN.index(stored_dtype(name, tensors[name].dtype)), name))
    entries, end = {}, 0
    for name in order:
        entries[name] = entry_of(name, tensors[name], end)
        end += tensors[name].nbytes
    header = json.dumps(METADATA | entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-len(header) // ALIGNMENT) * ALIGNMENT
    path.unlink(missing_ok=True)  # tensors may be mapped from a file of that name, which must not shrink under them
    with path.open("wb", buffering=0) as stream:
        write_all(stream, length.to_bytes(8, "little") + header.ljust(length))
        for name in order:
            write_all(stream, raw_bytes(tensors[name]))


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


def _read_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of the header, and where the bytes of the tensors begin. Raises ValueError when it is no header."""
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MOST_HEADER, path.stat().st_size - 8):
            raise ValueError("the header is longer than the file")
        try:
            entries = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_repeats)
        except RecursionError as error:
            raise ValueError("the header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    entries.pop("__metadata__", None)
    return entries, 8 + length


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
