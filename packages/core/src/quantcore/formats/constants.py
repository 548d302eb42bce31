"""Tensors that are the same for every call: made once, and kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, update_wrapper
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """As `functools.cache`, for a function that makes tensors, which outlive what the caller is in the midst of.

    They are made in a thread of their own, for which no context of the caller holds: a default device
    (`with torch.device("meta")`), inference mode, a tracer's fake tensors, or the memory of a CUDA graph, in which
    torch allows nothing to stay that the graph does not give out.
    """

    def apart(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1) as other:
            return other.submit(make, *args, **kwargs).result()

    return update_wrapper(cache(apart), make)  # type: ignore[return-value]
