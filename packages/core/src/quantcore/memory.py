"""Memory that the C library keeps after it was freed, and gives back when it is told to."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back_freed_memory() -> None:
    """Return free pages of the heap to the operating system. glibc alone keeps them, and does it; elsewhere nothing.

    Blocks of up to 32 MB lie on its heap (mallopt(3), M_MMAP_THRESHOLD), and what frees one leaves a hole.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; no library at all under that name
        return None
