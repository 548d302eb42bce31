"""Writing of safetensors files tensor by tensor: what is written needs no memory any more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcore.checkpoints.files import write_json
from quantcore.checkpoints.read import INDEX_NAME, SINGLE_NAME
from quantcore.checkpoints.safetensors_file import ALIGNMENT, METADATA, entry_of, raw_bytes, write_all

_ENTRY = 160  # bytes of a header entry besides the name: dtype, a shape of eight numbers, two offsets
_MOST_HEADER = 8 << 20  # bytes reserved for the header of one file; safetensors refuses more than 100 MB
_MOST_HELD = 64 << 20  # bytes of tensors that wait for the end of their file


class ShardWriter:
    """Writes tensors as they come into safetensors files of at most max_shard_size bytes, then the index.

    names: of the tensors to come, or more: they tell how much room a file's header takes. A tensor that is larger than
    max_shard_size gets a file of its own. Memory: one tensor, and those whose length is no multiple of 8 bytes until
    their file ends. The files have their final names, which say how many there are, after `finish`.
    Raises OSError naming the file when it cannot be written.
    """

    def __init__(self, directory: Path, max_shard_size: int, names: Iterable[str]) -> None:
        self._directory = directory
        self._limit = max_shard_size
        self._room = min(_MOST_HEADER, sum(_entry_room(name) for name in names))
        self._files: list[_File] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device and strides."""
        if not self._files or not self._files[-1].has_room(name, tensor, self._limit):
            if self._files:
                self._files[-1].close()
            self._open(max(self._room, _entry_room(name)))
        self._files[-1].add(name, tensor)

    def finish(self) -> None:
        """Close the last file, name all, and write the index if there are several."""
        if not self._files:
            self._open(self._room)
        self._files[-1].close()
        count = len(self._files)
        names = [SINGLE_NAME] if count == 1 else [shard_name(number, str(count)) for number in range(1, count + 1)]
        for file, name in zip(self._files, names, strict=True):
            file.path.replace(self._directory / name)
        if count > 1:
            self._write_index(names)

    def _open(self, room: int) -> None:
        self._files.append(_File(self._directory / shard_name(len(self._files) + 1, "unknown"), room))

    def _write_index(self, names: list[str]) -> None:
        weight_map = {tensor: name for file, name in zip(self._files, names, strict=True) for tensor in file.entries}
        write_index(weight_map, sum(file.size for file in self._files), self._directory)


def write_index(weight_map: Mapping[str, str], total_size: int, directory: Path) -> None:
    """Write the index of several files; total_size: bytes of all tensors."""
    write_json({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}, directory / INDEX_NAME)


def shard_name(number: int, count: str) -> str:
    """The file name of a shard; count has five digits when it is a number."""
    return f"model-{number:05d}-of-{count:0>5}.safetensors"


class _File:
    """One safetensors file. Its header comes first in the file and is written last, padded with blanks to its room."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.size = 0  # bytes of all tensors
        self.entries: dict[str, dict[str, Any]] = {}
        self._held: list[tuple[str, Tensor]] = []
        self._written = 0
        self._room = -(-(room + len(json.dumps(METADATA))) // ALIGNMENT) * ALIGNMENT
        self._room_left = room
        self._stream = path.open("wb", buffering=0)
        self._stream.seek(8 + self._room)

    def has_room(self, name: str, tensor: Tensor, limit: int) -> bool:
        """Whether a tensor may be added to a file that holds some already."""
        held = sum(waiting.nbytes for _, waiting in self._held)
        return self.size + tensor.nbytes <= limit and _entry_room(name) <= self._room_left and held <= _MOST_HELD

    def add(self, name: str, tensor: Tensor) -> None:
        self.size += tensor.nbytes
        self._room_left -= _entry_room(name)
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
        header = json.dumps(METADATA | self.entries, separators=(",", ":")).encode()
        assert len(header) <= self._room, "an entry is longer than _entry_room says"
        self._write(self._room.to_bytes(8, "little") + header.ljust(self._room), at=0)
        self._stream.close()

    def _append(self, name: str, tensor: Tensor) -> None:
        self._write(raw_bytes(tensor), at=8 + self._room + self._written)
        self.entries[name] = entry_of(name, tensor, self._written)
        self._written += tensor.nbytes

    def _write(self, content: bytes | memoryview, at: int) -> None:
        self._stream.seek(at)
        write_all(self._stream, content)


def _entry_room(name: str) -> int:
    return len(json.dumps(name)) + _ENTRY
