"""The processes that torchrun started: how they become one group, and how the failure of one ends all of them."""

from __future__ import annotations

import atexit
import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from quantcore import settings
from quantcore.errors import ProcessGroupError

_PATIENCE = datetime.timedelta(hours=24)  # while one process trains or writes, others wait; one that dies is noticed
_FAILURE = "quantcore/failure"
_COUNT = "quantcore/failures"
_SHOWN = "quantcore/shown"
_SILENT = (
    "another of {} processes ended without a word, as one does that is killed; finished blocks are kept, "
    "and the same command goes on from them"
)
_stores: list[Any] = []  # of the group that `join_processes` made; it outlives the group


def join_processes() -> None:
    """Initialize the default group of torch.distributed where torchrun's variables are there and nobody did.

    gloo for tensors on a CPU, nccl for those on GPUs where each process of this machine has one of its own, which
    becomes its current device.
    """
    found = settings.torchrun()
    if found is None or not dist.is_available() or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() >= found.local_processes:
        torch.cuda.set_device(found.local_rank)
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else backend
    dist.init_process_group(backend, timeout=_PATIENCE)
    _stores[:] = [dist.distributed_c10d._get_default_store()]
    atexit.register(_leave)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A block in which processes wait for each other: an error that one of them raises becomes that of the others.

    The group is left on an error where `join_processes` made it, so that nobody waits for this process any more.
    """
    try:
        yield
    except ProcessGroupError:
        _leave()
        raise
    except BaseException as error:
        _tell(error)
        _leave()
        raise


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """A block that waits for other processes. Raises ProcessGroupError, with what one of them said, where it ended."""
    try:
        yield
    except RuntimeError as error:  # of the connection: values of others are no part of what may fail here
        raise ProcessGroupError(_told() or _SILENT.format(dist.get_world_size())) from error


def shows_error() -> bool:
    """Whether this process shows why it ends: of several that end together, the first to ask does."""
    if not _stores:
        return settings.is_first_process()
    with contextlib.suppress(RuntimeError):
        return bool(_stores[0].add(_SHOWN, 1) == 1)
    return settings.is_first_process()  # the store is gone with the process that held it


def _tell(error: BaseException) -> None:
    """Leave word for the other processes of why this one ends."""
    with contextlib.suppress(RuntimeError, ValueError):
        store = _store()
        if store.add(_COUNT, 1) == 1:
            text = str(error) or type(error).__name__
            store.set(_FAILURE, f"process {dist.get_rank()} of {dist.get_world_size()} ended: {text}")


def _told() -> str | None:
    with contextlib.suppress(RuntimeError, ValueError):
        store = _store()
        if store.add(_COUNT, 0):
            store.wait([_FAILURE], datetime.timedelta(seconds=5))
            return str(store.get(_FAILURE).decode())
    return None


def _store() -> Any:
    return _stores[0] if _stores else dist.distributed_c10d._get_default_store()


def _leave() -> None:
    if _stores and dist.is_initialized():
        dist.destroy_process_group()
