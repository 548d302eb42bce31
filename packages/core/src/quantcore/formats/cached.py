"""Tensors that are the same for every call: made once, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, update_wrapper
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def cached_tensors(make: Callable[P, T], most: int | None = None) -> Callable[P, T]:
    """As `functools.lru_cache`, for a function that makes tensors, which outlive what the caller is in the midst of.

    They are made in a thread of their own, for which no context of the caller holds: a default device
    (`with torch.device("meta")`), inference mode, a tracer's fake tensors, or the memory of a CUDA graph, in which
    torch allows nothing to stay that the graph does not give out. What is made for a GPU comes from the CPU by a
    synchronous copy, for that thread's stream is not the caller's. most: how many results are kept, None for all.
    """

    def apart(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1) as other:
            return other.submit(make, *args, **kwargs).result()

    return update_wrapper(lru_cache(most)(apart), make)  # type: ignore[return-value]
