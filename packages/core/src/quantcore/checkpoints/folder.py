"""A folder that is held open, so that what is read from it is of one version, and its files, only regular ones.

A folder that another takes the place of while it is read stays readable through its descriptor as far as it was
opened; what was not opened in time is missed, and said so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantcore.errors import CheckpointError

_HOLDS_FOLDERS = os.open in os.supports_dir_fd and os.listdir in os.supports_fd
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_MOST_AT_ONCE = 1 << 30  # bytes; systems read at most 2 GiB in one call


class ReplacedError(CheckpointError):
    """A checkpoint that was replaced or changed while it was read."""


class Folder:
    """A folder, by descriptor where the system can: names looked up later are still of the same folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY) if _HOLDS_FOLDERS else None
        self._close = weakref.finalize(self, _close, self._descriptor)

    def close(self) -> None:
        """Let go of the folder."""
        self._close()

    def names(self) -> list[str]:
        """The names of everything in the folder, sorted."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def open(self, name: str) -> HeldFile:
        """A file of the folder. Raises FileNotFoundError, and CheckpointError for what is no regular file."""
        path = self.path / name
        held = self._descriptor is not None
        try:
            found = os.open(name if held else path, os.O_RDONLY | _NO_WAIT, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"{path} is a link that leads to itself; put a file there") from error
            raise
        return HeldFile(path, found)

    def read(self, name: str) -> bytes:
        """The content of a file; raises what `open` raises."""
        with contextlib.closing(self.open(name)) as file:
            return file.read()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; CheckpointError for anything else, and what `open` raises."""
        return json_object(self.read(name), self.path / name)

    def is_current(self) -> bool:
        """Whether the path still leads to this folder."""
        if self._descriptor is None:
            return True
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        held = os.fstat(self._descriptor)
        return (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino)

    def kinds(self) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a regular file, at the end of links that stay where they may) for everything inside."""
        for name in self.names():
            with contextlib.suppress(OSError):
                found = os.stat(self.path / name if self._descriptor is None else name, dir_fd=self._descriptor)
                yield name, stat.S_ISREG(found.st_mode) and stays_inside(self.path, name)


class HeldFile:
    """A regular file that is open for reading. Threads may read it side by side."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._lock = threading.Lock()
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            self.close()
            raise CheckpointError(f"{path} is no regular file but a folder, pipe or device; put a file there")
        self._stamp = self._stamp_now()

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._stamp[0]

    def close(self) -> None:
        """Let go of the file."""
        self._close()

    def read(self, offset: int = 0, count: int | None = None) -> bytes:
        """Bytes from offset on, fewer than count where the file ends."""
        content = bytearray(max(0, self.size - offset if count is None else count))
        return bytes(content[: self.read_into(memoryview(content), offset)])

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a view from offset on, and return how many bytes there were."""
        done = 0
        while done < len(view):
            count = self._read_once(view[done : done + _MOST_AT_ONCE], offset + done)
            if count == 0:
                break
            done += count
        return done

    def check_unchanged(self) -> None:
        """Raise ReplacedError when the file was written to since it was opened."""
        if self._stamp_now() != self._stamp:
            raise ReplacedError(f"{self.path}: was changed while it was read; load it again when its writer is done")

    def _stamp_now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _read_once(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            content = os.read(self._descriptor, len(view))
        view[: len(content)] = content
        return len(content)


class FilesBeside(Mapping[str, bytes]):
    """The regular files of a folder by name, less those that a predicate on names leaves out; read when asked for."""

    def __init__(self, folder: Folder, leaves_out: Any) -> None:
        self._folder = folder
        self._leaves_out = leaves_out

    def __getitem__(self, name: str) -> bytes:
        if name not in self:
            raise KeyError(name)
        return self._folder.read(name)

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)

    def __iter__(self) -> Iterator[str]:
        return (name for name, is_file in self._folder.kinds() if is_file and not self._leaves_out(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def json_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the bytes of a file; CheckpointError naming it for anything else."""
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # besides what is no JSON: numbers of too many digits
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def stays_inside(folder: Path, name: str) -> bool:
    """Whether a name leads, over links, to a file of the folder or of the hub's cache that the folder belongs to."""
    place = folder.resolve()
    target = (folder / name).resolve()
    stores = (place, place.parent.parent / "blobs")  # a snapshot of the cache is a folder of links into "blobs"
    return any(target.is_relative_to(store) for store in stores)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)
