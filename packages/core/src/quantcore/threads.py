"""How many threads torch uses on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Holds the operations of torch that this thread calls to one thread each.

    For loops of short operations: threads that meet after each of them all wait for the busiest core.
    """
    threads = torch.get_num_threads()
    _limit_here(1)
    try:
        yield
    finally:
        _limit_here(threads)


def share_out(work: Callable[[T], None], items: Iterable[T], device: torch.device) -> None:
    """Calls work(item) for every item, in any order and without gradients; work must not touch what others write.

    On a CPU as many threads as torch gives to one operation share the items, and each runs its operations alone: for
    parts of a tensor that stay in a core's cache. Elsewhere the calling thread takes them all. The first error is
    raised, after the other threads have finished their items.
    """
    rest = deque(items)
    job = partial(_take_all, work, rest)
    threads = min(torch.get_num_threads(), len(rest))
    if device.type != "cpu":
        job()
    elif threads < 2:
        with one_cpu_thread():
            job()
    else:
        run_in_threads(job, threads)


def run_in_threads(job: Callable[[], None], threads: int) -> None:
    """Runs job in each of so many new threads, where every operation of torch uses that thread alone.

    The first error is raised, after all have ended.
    """

    def run() -> None:
        with one_cpu_thread():
            job()

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run) for _ in range(threads)]
    for future in futures:
        future.result()


def _limit_here(threads: int) -> None:
    """Have operations that this thread calls use so many threads. What other threads use stays as it is.

    `torch.set_num_threads` also says how many threads use that have yet to start. OpenMP keeps a number a thread.
    """
    torch.get_num_threads()  # the first look in a thread takes over what torch keeps, and would undo what follows
    limit = _openmp()
    if limit is not None:
        limit(threads)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=1)
def _openmp() -> Callable[[int], None] | None:
    """OpenMP's own call for the number of threads, None where torch has not loaded it for all to see."""
    try:
        call = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return None
    call.restype, call.argtypes = None, [ctypes.c_int]
    found: Callable[[int], None] = call
    return found


def _take_all(work: Callable[[T], None], rest: deque[T]) -> None:
    with torch.no_grad(), suppress(_Finished):
        while True:
            work(_next(rest))


class _Finished(Exception):
    """Nothing is left."""


def _next(rest: deque[T]) -> T:
    try:
        return rest.popleft()
    except IndexError:
        raise _Finished from None
