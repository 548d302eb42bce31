"""Writing of safetensors files, the one way: tensor by tensor, so that what is written needs no memory any more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcore.checkpoints.safetensors_file import ALIGNMENT, FORMAT, entry_of, place_of_dtype, raw_bytes, write_all

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_ENTRY = 160  # bytes of a header entry besides the name: dtype, a shape of eight numbers, two offsets
_MOST_HEADER = 8 << 20  # bytes reserved for the tensors of one file; safetensors refuses more than 100 MB
_MOST_HELD = 64 << 20  # bytes of tensors that wait for the end of their file


class ShardWriter:
    """Writes tensors as they come into safetensors files of at most max_shard_size bytes, then the index.

    names: of the tensors to come, or more: they tell how much room a file's header takes. metadata: for the header of
    every file. always_indexed, tensors: see `Outline`. A tensor that is larger than max_shard_size gets a file of its
    own. Memory: one tensor, and of files that are not planned those whose length is no multiple of 8 bytes until their
    file ends. The files have their final names, which say how many there are, after `finish`.
    Raises OSError naming the file when it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        max_shard_size: int,
        names: Iterable[str],
        metadata: Mapping[str, str] | None = None,
        always_indexed: bool = False,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._directory = directory
        self._limit = max_shard_size
        self._metadata = metadata or {}
        self._always_indexed = always_indexed
        self._room = min(_MOST_HEADER, sum(entry_room(name) for name in names))
        self._files: list[_File | _PlannedFile] = []
        self._planned: dict[str, _PlannedFile] = {}
        for shard in _split(tensors or {}, max_shard_size):
            file = _PlannedFile(self._next_path(), shard, self._metadata)
            self._files.append(file)
            self._planned |= dict.fromkeys(shard, file)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device and strides."""
        if name in self._planned:
            self._planned[name].add(name, tensor)
            return
        last = self._files[-1] if self._files else None
        if not isinstance(last, _File) or not last.has_room(name, tensor, self._limit):
            if last is not None:
                last.close()
            last = self._open(max(self._room, entry_room(name)))
        last.add(name, tensor)

    def finish(self) -> None:
        """Close the last file, name all, and write the index if there are several."""
        if not self._files:
            self._open(self._room)
        for file in self._planned.values() if self._planned else self._files[-1:]:
            file.close()
        _name_files(self._directory, self._files, self._always_indexed)

    def _open(self, room: int) -> _File:
        file = _File(self._next_path(), room, self._metadata)
        self._files.append(file)
        return file

    def _next_path(self) -> Path:
        return self._directory / _shard_name(len(self._files) + 1, "unknown")


class _PlannedFile:
    """One safetensors file whose tensors are known: its header comes first, and each tensor has its place.

    Its bytes are those of the safetensors library: wide elements before narrow ones, then by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.size = 0  # bytes of all tensors
        self.entries: dict[str, dict[str, Any]] = {}
        for name in sorted(tensors, key=lambda name: (place_of_dtype(name, tensors[name].dtype), name)):
            self.entries[name] = entry_of(name, tensors[name], self.size)
            self.size += tensors[name].nbytes
        header = _encoded({"__metadata__": _with_format(metadata)} | self.entries)
        self._start = 8 + -(-len(header) // ALIGNMENT) * ALIGNMENT
        self._missing = set(tensors)
        self._stream = path.open("wb", buffering=0)
        write_all(self._stream, (self._start - 8).to_bytes(8, "little") + header.ljust(self._start - 8))

    def add(self, name: str, tensor: Tensor) -> None:
        self._stream.seek(self._start + self.entries[name]["data_offsets"][0])
        write_all(self._stream, raw_bytes(tensor))
        self._missing.discard(name)

    def close(self) -> None:
        assert not self._missing, f"tensors that were announced did not come: {sorted(self._missing)[:3]}"
        self._stream.close()


class _File:
    """One safetensors file. Its header comes first in the file and is written last, padded with blanks to its room.

    room: bytes for the entries of its tensors.
    """

    def __init__(self, path: Path, room: int, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.size = 0  # bytes of all tensors
        self.entries: dict[str, dict[str, Any]] = {}
        self._head = {"__metadata__": _with_format(metadata)}
        self._held: list[tuple[str, Tensor]] = []
        self._written = 0
        self._room_left = room
        self._room = -(-(room + len(_encoded(self._head))) // ALIGNMENT) * ALIGNMENT
        self._stream = path.open("wb", buffering=0)
        self._stream.seek(8 + self._room)

    def has_room(self, name: str, tensor: Tensor, limit: int) -> bool:
        """Whether a tensor may be added to a file that holds some already."""
        held = sum(waiting.nbytes for _, waiting in self._held)
        return self.size + tensor.nbytes <= limit and entry_room(name) <= self._room_left and held <= _MOST_HELD

    def add(self, name: str, tensor: Tensor) -> None:
        self.size += tensor.nbytes
        self._room_left -= entry_room(name)
        self.entries[name] = {}
        if tensor.nbytes % ALIGNMENT:
            self._held.append((name, tensor))
        else:
            self._append(name, tensor)

    def close(self) -> None:
        """Write what waits, widest elements first so that each stays aligned, and the header."""
        for name, tensor in sorted(self._held, key=lambda item: -item[1].itemsize):
            self._append(name, tensor)
        self._held.clear()
        header = _encoded(self._head | self.entries)
        assert len(header) <= self._room, "an entry is longer than entry_room says"
        self._write(self._room.to_bytes(8, "little") + header.ljust(self._room), at=0)
        self._stream.close()

    def _append(self, name: str, tensor: Tensor) -> None:
        self._write(raw_bytes(tensor), at=8 + self._room + self._written)
        self.entries[name] = entry_of(name, tensor, self._written)
        self._written += tensor.nbytes

    def _write(self, content: bytes | memoryview, at: int) -> None:
        self._stream.seek(at)
        write_all(self._stream, content)


def _with_format(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """What a file says of itself; where that has a format, it stays in its place."""
    return metadata if set(FORMAT) <= set(metadata) else {**FORMAT, **metadata}


def _name_files(directory: Path, files: Sequence[_File | _PlannedFile], always_indexed: bool) -> None:
    """Give files their final names; one alone is model.safetensors, several have numbers and an index."""
    if len(files) == 1 and not always_indexed:
        files[0].path.replace(directory / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = _shard_name(number, str(len(files)))
        file.path.replace(directory / name)
        weight_map |= dict.fromkeys(file.entries, name)
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Consecutive tensors that make at most limit bytes together; a single larger one is alone."""
    shards: list[dict[str, Tensor]] = []
    size = limit
    for name, tensor in tensors.items():
        if not shards or size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _shard_name(number: int, count: str) -> str:
    """The file name of a shard; count has five digits when it is a number."""
    return f"model-{number:05d}-of-{count:0>5}.safetensors"


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def entry_room(name: str) -> int:
    return len(json.dumps(name, ensure_ascii=False).encode()) + _ENTRY
