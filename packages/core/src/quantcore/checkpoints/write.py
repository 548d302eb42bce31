"""Writing of checkpoints: visible under the final name only when complete, and in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from quantcore.checkpoints.shards import ShardWriter

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_HERE = -100  # AT_FDCWD of Linux: names are of the working folder


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the target's name when the block ends well, and vanishes when it does not.

    What a process that was killed left beside the target is removed. A link stays a link: the folder it points to is
    the target. Raises FileExistsError when target exists and overwrite is false, or is a file; an overwritten folder is
    exchanged for the new one in one step where the system can, and removed then.
    """
    final = Path(target).resolve()
    check_folder_free(final, overwrite)
    with _working_folder(final) as working:
        yield working
        _sync_tree(working)
        check_folder_free(final, overwrite)
        _take_name(working, final, overwrite)


@contextlib.contextmanager
def atomic_file(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """The path of a file to write, which takes the target's name as `atomic_directory` says of a folder."""
    final = Path(target).resolve()
    check_file_free(final, overwrite)
    with _working_folder(final) as working:
        yield working / final.name
        _sync_tree(working)
        check_file_free(final, overwrite)
        if overwrite:
            os.replace(working / final.name, final)
        else:
            _link(working / final.name, final)
        _sync(final.parent)


@contextlib.contextmanager
def work_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside a target for work that is kept when it is cut short, and removed when the block ends well.

    Raises FileExistsError while another process works there.
    """
    final = Path(target).resolve()
    folder = final.parent / f".{final.name}.unfinished"
    with locked_folder(folder):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """A block in which no other process has this folder locked; it is made where it is not there, and left if empty.

    Raises FileExistsError while another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _locked(folder)
    except BlockingIOError as error:
        raise FileExistsError(f"{folder}: another process works for the same target there; wait for its end") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where it holds something, that is kept
            folder.rmdir()
        if lock is not None:
            os.close(lock)


def write_tensors(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as model.safetensors, or as shards with an index when they exceed max_shard_size.

    max_shard_size: bytes, or a string such as "5GB" or "500MiB". The files have the bytes that the safetensors library
    gives them. Contiguous tensors on the CPU are written without a
    copy, others one by one.
    """
    writer = ShardWriter(directory, parse_size(max_shard_size), (), tensors=tensors)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def parse_size(size: int | str, setting: str = "size") -> int:
    """Bytes of a size such as "5GB", "500MiB" or 1000. setting: what it was given as.

    Raises ValueError for anything else or a size below 1.
    """
    text = str(size).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text)
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"{setting} {size!r} is not understood; write it as '5GB', '500MiB' or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


@contextlib.contextmanager
def _working_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside the final name, locked while this process lives; removed with all that is left in it."""
    _sweep(final)
    try:
        working, lock = _make_locked(final)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot be made: {error.strerror}; choose another folder", str(final)
        ) from error
    try:
        yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_locked(final: Path) -> tuple[Path, int | None]:
    """A new folder and the descriptor that holds its lock, None where folders cannot be locked."""
    while True:
        working = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
        working.mkdir(parents=True)
        lock = _lock(working)
        if working.is_dir():  # else another process swept it before it was locked
            return working, lock
        if lock is not None:
            os.close(lock)


def _sweep(final: Path) -> None:
    """Remove what processes that are dead left of their writing under this name."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.(partial|old)")
    for path in final.parent.glob(f".{_glob_escape(final.name)}.*"):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or (match[1] == "old" and not final.exists()):
            continue  # an old version whose new one did not get its name is all that there is
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _glob_escape(name: str) -> str:
    """A name as a pattern of `Path.glob` that matches it alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _lock(folder: Path) -> int | None:
    """The descriptor of a folder that is now locked; None where another process holds it, or the system cannot."""
    try:
        return _locked(folder)
    except BlockingIOError:
        return None


def _locked(folder: Path) -> int | None:
    """As `_lock`; raises BlockingIOError where another process holds it."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def check_folder_free(final: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a folder of this name may not be written."""
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{final} is a file; choose another name for the folder")
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; choose another folder, or allow it to be overwritten")


def check_file_free(final: Path, overwrite: bool) -> None:
    """Raise FileExistsError where a file of this name may not be written."""
    if final.exists() and not final.is_file():
        raise FileExistsError(f"{final} is no file; choose another name for the file")
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; choose another name, or allow it to be overwritten")


def _take_name(working: Path, final: Path, overwrite: bool) -> None:
    if overwrite and final.exists():
        _replace(working, final)
    else:  # by one system call: what another program puts there meanwhile is not replaced
        try:
            os.rename(working, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise FileExistsError(f"{final} exists since a moment ago; another program saves there too") from error
    _sync(final.parent)


def _link(working: Path, final: Path) -> None:
    try:
        os.link(working, final)
    except FileExistsError as error:
        raise FileExistsError(f"{final} exists since a moment ago; another program saves there too") from error
    except OSError:  # a file system without links
        os.rename(working, final)


def _replace(working: Path, final: Path) -> None:
    """Put the new folder in place of the old one, which then lies where the new one was made and is removed."""
    if _exchange(working, final):
        return
    old = final.parent / f".{final.name}.{secrets.token_hex(4)}.old"
    os.rename(final, old)
    try:
        os.rename(working, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    call = _exchanging()
    return call is not None and call(os.fsencode(one), os.fsencode(other)) == 0


@functools.lru_cache(maxsize=1)
def _exchanging() -> Callable[[bytes, bytes], int] | None:
    """The system's call that exchanges two names, None where it has none."""
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "linux":
            rename = library.renameat2
            return lambda one, other: int(rename(_HERE, one, _HERE, other, _SWAP))
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda one, other: int(swap(one, other, _SWAP))
    except (AttributeError, OSError, TypeError):  # another or an older C library
        pass
    return None


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
