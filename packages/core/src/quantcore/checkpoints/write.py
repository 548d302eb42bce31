"""Writing of checkpoints: sharded, and visible under the final name only when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from quantcore.checkpoints.read import SINGLE_NAME
from quantcore.checkpoints.safetensors_file import write_tensors as write_file
from quantcore.checkpoints.shards import shard_name, write_index

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@contextlib.contextmanager
def atomic_directory(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the target's name when the block ends well, and vanishes when it does not.

    Raises FileExistsError when target exists and overwrite is false, or is a file; an overwritten folder is removed
    only after the new one is in place. A link stays a link: the folder it points to is the target.
    """
    final = Path(target).resolve()
    _check_free(final, overwrite)
    working = final.parent / f".{final.name}.{secrets.token_hex(4)}.partial"
    try:
        working.mkdir(parents=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot be made: {error.strerror}; choose another folder", str(final)
        ) from error
    try:
        yield working
        _sync_tree(working)
        _check_free(final, overwrite)
        _take_name(working, final, overwrite)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def write_tensors(tensors: Mapping[str, Tensor], directory: Path, max_shard_size: int | str = "5GB") -> None:
    """Write tensors as model.safetensors, or as shards with an index when they exceed max_shard_size.

    max_shard_size: bytes, or a string such as "5GB" or "500MiB". The files have the bytes that the safetensors library
    gives them. Contiguous tensors on the CPU are written without a copy, others one by one.
    """
    shards = _split(tensors, parse_size(max_shard_size))
    count = len(shards)
    names = [SINGLE_NAME] if count == 1 else [shard_name(number, str(count)) for number in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_index(weight_map, sum(tensor.nbytes for tensor in tensors.values()), directory)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500MiB" or 1000. Raises ValueError for anything else or a size below 1."""
    text = str(size).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text)
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise ValueError(f"size {size!r} is not understood; write it as '5GB', '500MiB' or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Consecutive shards of at most limit bytes; a single larger tensor gets a shard of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _check_free(final: Path, overwrite: bool) -> None:
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{final} is a file; choose another name for the folder")
    if final.exists() and not overwrite:
        raise FileExistsError(f"{final} exists; choose another folder, or allow it to be overwritten")


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


def _replace(working: Path, final: Path) -> None:
    old = final.parent / f".{final.name}.{secrets.token_hex(4)}.old"
    os.rename(final, old)
    try:
        os.rename(working, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old)


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
