"""Peak memory of a piece of work, for tests: measured by the process that does it, judged by the one that asked."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

TRIES = 3

# The environment of a process that measures itself. glibc then gives blocks of this size back at once; by default it
# moves the size up as they are freed, and holes in its heap count, more or fewer of them by the machine. A thread has a
# heap of its own.
STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}


def mark() -> int:
    """Bytes that this process holds now. Its high-water mark begins here anew, where the system can do that: a peak
    that imports left behind would hide what the work adds.
    """
    with contextlib.suppress(OSError):  # no Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")
    return _high_water()


def added(before: int) -> int:
    """Bytes by which the high-water mark has passed `before`, that of `mark`."""
    return _high_water() - before


def _high_water() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would begin at that of the process that started this one.
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def assert_within(measure: Callable[[], int], most: float, least: float = 0) -> None:
    """One of three measurements is between `least` and `most` bytes: what a busy system adds, it does not add each
    time; what the code takes, it takes each time. Raises AssertionError with what was measured.
    """
    seen: list[int] = []
    while len(seen) < TRIES:
        seen.append(measure())
        if least <= seen[-1] <= most:
            return
    raise AssertionError(f"measured {seen} bytes; expected {least:.0f} to {most:.0f}")
