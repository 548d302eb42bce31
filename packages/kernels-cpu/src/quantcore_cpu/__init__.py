"""Native CPU kernels for quantcore, found through the entry-point group `quantcore.kernels`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quantcore.sdk import hookimpl

if TYPE_CHECKING:
    from quantcore.sdk import Kernel


@hookimpl
def quantcore_kernels() -> Iterable[Kernel]:
    from quantcore_cpu.kernels import KERNELS

    return KERNELS
