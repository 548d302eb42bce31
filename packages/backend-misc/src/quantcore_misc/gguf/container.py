"""GGUF files: headers checked against the file before anything is made of them, tensors mapped from it, and writing.

Source of the layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import CheckpointError
from quantcore_misc.gguf.layouts import swap_bytes
from quantcore_misc.gguf.metadata import Cursor, Value, value_of, write_text, write_values
from quantcore_misc.gguf.types import GgmlType, tensor_bytes, type_of_number

MAGIC = b"GGUF"
_VERSION, _VERSIONS = 3, (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32
_LARGEST_ALIGNMENT = 1 << 20
_LEAST_VALUE, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes of a key with its value, and of a tensor's header
_DIMENSIONS = 4
_LONGEST_NAME = 1 << 12  # bytes
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PIECE = 64 << 20  # bytes that are put into the other byte order at a time


class Entry(NamedTuple):
    """What a file says of one tensor. shape: as torch has it, in weights. offset: of its first byte in the file."""

    file: Path
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.kind, self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that holds it: bytes of rows for blocks."""
        return self.shape if self.kind.dtype else (*self.shape[:-1], self.kind.row_bytes(self.shape[-1]))

    @property
    def stored_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.kind.dtype or "uint8")
        return found


class Contents(NamedTuple):
    """What stands in a file, or in all files of a split one, besides the numbers themselves."""

    metadata: dict[str, Value]
    entries: dict[str, Entry]
    is_swapped: bool = False

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, without its kind."""
        return self.metadata[key].data if key in self.metadata else default


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as one of GGUF does, or has its name."""
    file = Path(path)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(4) == MAGIC or file.suffix == ".gguf"


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Metadata and tensors of a file; of a split one, given by any of its parts, those of all.

    Raises CheckpointError that names file and fault: what is truncated, of another version, out of the file's bounds,
    overlapping, or named twice.
    """
    first = _read_file(Path(path))
    count = int(first.get("split.count", 0) or 0)
    if count < 2:
        return first
    return _joined([_read_file(part) for part in _parts(Path(path), count)], Path(path))


def read_tensors(contents: Contents, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the named tensors, or all, in file order; each owns its memory.

    Blocks come as uint8 [..., bytes of a row], plain numbers in their dtype. Raises CheckpointError where a file has
    become shorter since its header was read.
    """
    wanted = contents.entries if names is None else {name: contents.entries[name] for name in names}
    by_file: dict[Path, list[str]] = {}
    for name, entry in wanted.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, owned in by_file.items():
        with mapped_file(file) as mapped:
            for name in sorted(owned, key=lambda each: wanted[each].offset):
                yield name, tensor_in(mapped, name, wanted[name], contents.is_swapped)


def tensor_in(mapped: mmap.mmap, name: str, entry: Entry, swapped: bool, index: int | None = None) -> Tensor:
    """A tensor of a file, or one of its parts along the first dimension; it owns its memory.

    Raises CheckpointError where the file has become shorter than its header says.
    """
    if entry.offset + entry.nbytes > len(mapped):
        raise CheckpointError(f"{entry.file}: ends within {name}; the file changed or is damaged, download it again")
    shape, nbytes, offset = entry.stored_shape, entry.nbytes, entry.offset
    if index is not None:
        nbytes //= shape[0]
        shape, offset = shape[1:], offset + index * nbytes
    if not nbytes:
        return torch.empty(shape, dtype=entry.stored_dtype)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=offset)
    owned = _other_order(flat, entry.kind) if swapped else flat.clone()
    return owned.view(entry.stored_dtype).view(shape)


def _other_order(flat: Tensor, kind: GgmlType) -> Tensor:
    if kind.fields:
        return swap_bytes(flat.view(-1, kind.nbytes), kind).flatten()
    return flat.view(-1, kind.nbytes).flip(1).contiguous().flatten()


def mapped_file(file: Path) -> mmap.mmap:
    """The file in memory, its pages read when they are touched; written ones would be this process's alone."""
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_file(path: Path) -> Contents:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; download it again")
    if path.stat().st_size < len(MAGIC) + 4:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are no GGUF file; download it again")
    with mapped_file(path) as mapped:
        view = memoryview(mapped)
        try:
            return _parse(view, path)
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged or no GGUF file: {error}; download or convert it again") from error
        finally:
            view.release()


def _parse(view: memoryview, path: Path) -> Contents:
    order = _byte_order(view)
    cursor = Cursor(view, order)
    cursor.take(8, "the version")
    tensors = cursor.count("the number of tensors", _LEAST_TENSOR)
    values = cursor.count("the number of values", _LEAST_VALUE)
    metadata: dict[str, Value] = {}
    for _ in range(values):
        key, value = cursor.value()
        if key in metadata:
            raise ValueError(f"the key {key!r:.80} stands there twice")
        metadata[key] = value
    headers: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
    for _ in range(tensors):
        name, header = _header(cursor)
        if name in headers:
            raise ValueError(f"the tensor {name!r:.80} stands there twice")
        headers[name] = header
    alignment = _alignment(metadata)
    start = -(-cursor.position // alignment) * alignment
    entries = {name: Entry(path, kind, shape, start + offset) for name, (kind, shape, offset) in headers.items()}
    _check_layout(entries, start, alignment, len(view))
    return Contents(metadata, entries, order != _native())


def _native() -> str:
    return "<" if sys.byteorder == "little" else ">"


def _byte_order(view: memoryview) -> str:
    """The byte order by which the version is one that is known."""
    if bytes(view[:4]) != MAGIC:
        raise ValueError(f"it begins with {bytes(view[:4])!r}, not {MAGIC!r}")
    found = {order: struct.unpack(f"{order}I", view[4:8])[0] for order in "<>"}
    order = next((order for order, version in found.items() if version in _VERSIONS), None)
    if order is None:
        raise ValueError(f"version {min(found.values())}, where 2 and 3 are read")
    return order


def _header(cursor: Cursor) -> tuple[str, tuple[GgmlType, tuple[int, ...], int]]:
    name = cursor.text("the name of a tensor", _LONGEST_NAME)
    count = cursor.number("I", f"number of dimensions of {name!r:.80}")
    if not 1 <= count <= _DIMENSIONS:
        raise ValueError(f"{name!r:.80} has {count} dimensions, where 1 to {_DIMENSIONS} are possible")
    shape = tuple(reversed(cursor.numbers("Q", count, f"dimensions of {name!r:.80}")))
    number, offset = cursor.number("I", f"type of {name!r:.80}"), cursor.number("Q", f"offset of {name!r:.80}")
    try:
        kind = type_of_number(number)
        tensor_bytes(kind, shape)
    except ValueError as error:
        raise ValueError(f"{name!r:.80}, {list(shape)}: {error}") from error
    return name, (kind, shape, offset)


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get(_ALIGNMENT_KEY)
    if value is None:
        return _ALIGNMENT
    usable = isinstance(value.data, int) and value.data in {1 << power for power in range(3, 21)}
    if not usable:
        raise ValueError(f"{_ALIGNMENT_KEY} is {value.data!r:.80}, no power of two from 8 to {_LARGEST_ALIGNMENT}")
    return int(value.data)


def _check_layout(entries: Mapping[str, Entry], start: int, alignment: int, size: int) -> None:
    """Raise ValueError listing every tensor that is not aligned, not within the file, or over another."""
    faults, end, before = [], start, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        stop = entry.offset + entry.nbytes
        if (entry.offset - start) % alignment:
            faults.append(f"{name!r:.80} begins at {entry.offset - start}, no multiple of {alignment}")
        if stop > size:
            faults.append(f"{name!r:.80} ends at {stop}, and the file at {size}")
        elif entry.nbytes and entry.offset < end:
            faults.append(f"{name!r:.80} lies over {before!r:.80}")
        if stop > end:
            end, before = stop, name
    if faults:
        raise ValueError("; ".join(faults))


# Split files


def _parts(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or count > 99999:
        raise CheckpointError(
            f"{path}: is one of {count} parts, whose names end in -00001-of-{count:05d}.gguf; rename it"
        )
    return [path.with_name(part_name(match[1], number, count)) for number in range(1, count + 1)]


def part_name(stem: str, number: int, count: int) -> str:
    """The file name of a part of a split file, numbered from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def _joined(parts: list[Contents], path: Path) -> Contents:
    faults = [
        f"part {number + 1} says that it is {part.get('split.no')} of {part.get('split.count')}"
        for number, part in enumerate(parts)
        if (part.get("split.no"), part.get("split.count")) != (number, len(parts))
    ]
    names = [name for part in parts for name in part.entries]
    faults += [f"{name} is in several parts" for name in sorted({name for name in names if names.count(name) > 1})]
    expected = parts[0].get("split.tensors.count")
    if expected is not None and expected != len(names):
        faults.append(f"split.tensors.count is {expected}, and {len(names)} tensors are there")
    if len({part.is_swapped for part in parts}) > 1:
        faults.append("parts are in different byte orders")
    if faults:
        raise CheckpointError(f"{path}: parts of a split file disagree: {'; '.join(faults)}; download them again")
    entries = {name: entry for part in parts for name, entry in part.entries.items()}
    metadata = {key: value for key, value in parts[0].metadata.items() if not key.startswith("split.")}
    return Contents(metadata, entries, parts[0].is_swapped)


# Writing


class Planned(NamedTuple):
    """A tensor to write: its type and its shape in weights, as torch has it."""

    kind: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.kind, self.shape)


class GgufWriter:
    """Writes one file: the header when it is made, tensors as they come, in any order. Memory: one tensor.

    metadata: values, or Python values, which get the usual kinds. order: "<" or ">". The file is complete, and under
    its name, after `close`; what was written before vanishes with `discard`.
    Raises ValueError for tensors that were not planned, come twice, are missing, or do not fit their plan.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], planned: Mapping[str, Planned], order: str = "<"
    ) -> None:
        self._path, self._order = path, order
        values = {key: value if isinstance(value, Value) else value_of(value) for key, value in metadata.items()}
        alignment = _alignment(values)
        self._offsets, end = {}, 0
        for name, plan in planned.items():
            self._offsets[name] = end
            end = -(-(end + plan.nbytes) // alignment) * alignment
        head = write_head(values, planned, self._offsets, alignment, order)
        self._start, self._left = len(head), dict(planned)
        self._working = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._stream: BinaryIO = self._working.open("wb")
        self._stream.write(head)
        self._stream.truncate(self._start + end)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor as it is stored: blocks as uint8 [..., bytes of a row], plain numbers in their dtype."""
        plan = self._left.pop(name, None)
        if plan is None:
            raise ValueError(f"{name}: not planned, or written already")
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() != plan.nbytes:
            raise ValueError(f"{name}: {flat.numel()} bytes, where {plan.nbytes} are those of {plan.kind.name}")
        self._stream.seek(self._start + self._offsets[name])
        step = max(1, _PIECE // plan.kind.nbytes) * plan.kind.nbytes
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            swapped = piece if self._order == _native() else _other_order(piece, plan.kind)
            self._stream.write(swapped.numpy().data)

    def close(self) -> None:
        """Finish the file, and give it its name."""
        if self._left:
            self.discard()
            raise ValueError(f"{self._path}: not written: {', '.join(list(self._left)[:10])}")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._working.replace(self._path)

    def discard(self) -> None:
        """Remove what was written."""
        self._stream.close()
        self._working.unlink(missing_ok=True)


def write_head(
    values: Mapping[str, Value],
    planned: Mapping[str, Planned],
    offsets: Mapping[str, int],
    alignment: int,
    order: str = "<",
) -> bytes:
    """What stands in a file before its tensors, which lie at offsets from its end."""
    parts = [MAGIC, struct.pack(f"{order}IQQ", _VERSION, len(planned), len(values)), write_values(values, order)]
    for name, plan in planned.items():
        dims = plan.shape[::-1]
        numbers = (len(dims), *dims, plan.kind.number, offsets[name])
        parts += [write_text(name, order), struct.pack(f"{order}I{len(dims)}QIQ", *numbers)]
    head = b"".join(parts)
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0")


def tensor_content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in this machine's order."""
    found: memoryview = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def write_file(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[GgmlType, Tensor]],
    order: str = "<",
) -> None:
    """Write tensors that are in memory, each with its type, as one file."""
    planned = {
        name: Planned(kind, tuple(tensor.shape) if kind.dtype else _weights_of(kind, tensor))
        for name, (kind, tensor) in tensors.items()
    }
    writer = GgufWriter(Path(path), metadata, planned, order)
    try:
        for name, (_, tensor) in tensors.items():
            writer.add(name, tensor)
    except BaseException:
        writer.discard()
        raise
    writer.close()


def _weights_of(kind: GgmlType, rows: Tensor) -> tuple[int, ...]:
    return (*rows.shape[:-1], kind.row_elements(rows.shape[-1]))
