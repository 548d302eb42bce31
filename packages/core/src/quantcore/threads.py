"""How many threads torch uses on a CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Semaphore
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Holds torch to one thread per operation.

    For loops of short operations: threads that meet after each of them all wait for the busiest core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    threads_per_operation, started = torch.get_num_threads(), Semaphore(0)

    def run() -> None:
        torch.set_num_threads(1)  # torch also keeps it for threads yet to start: hence the reset below
        torch.get_num_threads()  # the first look in a thread takes over what torch keeps: have it before the reset
        started.release()
        job()

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(run) for _ in range(threads)]
            for _ in futures:
                started.acquire()
        finally:
            torch.set_num_threads(threads_per_operation)
    for future in futures:
        future.result()


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
