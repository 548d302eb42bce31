"""Choice of a kernel: every candidate is asked, and answers yes or why not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore import settings
from quantcore.errors import KernelUnavailableError
from quantcore.formats.base import WeightFormat
from quantcore.kernels import reference
from quantcore.plugins.manager import Plugins, plugins

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for: op ("linear" or "linear_input_grad") on a weight [N, K] and M rows of input."""

    op: str
    weight_format: WeightFormat
    device: str
    dtype: torch.dtype
    M: int
    N: int
    K: int


@dataclass(frozen=True)
class Kernel:
    """An implementation of the ops. Signatures are those of `quantcore.kernels.reference`.

    name: unique, such as "gemv_nf4". group: what QUANTCORE_KERNEL names: "torch", "triton" or "cpu".
    refuse: gives None for a problem it serves, else the reason in a few words. Higher priority is asked first.
    """

    name: str
    group: str
    refuse: Callable[[Problem], str | None]
    linear: Callable[..., Tensor]
    linear_input_grad: Callable[..., Tensor]
    priority: int = 0


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a problem, and each candidate that was asked with its answer (None: yes)."""

    kernel: Kernel
    trace: tuple[tuple[str, str | None], ...]


REFERENCE = Kernel(
    name="reference",
    group="torch",
    refuse=lambda problem: None,
    linear=reference.linear,
    linear_input_grad=reference.linear_input_grad,
    priority=-1000,
)


def choose(problem: Problem) -> Choice:
    """The first kernel that accepts a problem, in order of priority, with the trace of the choice.

    Raises KernelUnavailableError when QUANTCORE_KERNEL forces a group in which none accepts, with every reason.
    """
    return _choose(problem, settings.forced_kernel(), plugins(), plugins().generation)


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None, loaded: Plugins, generation: int) -> Choice:
    trace: list[tuple[str, str | None]] = []
    for kernel in _candidates(loaded, generation):
        reason = _refusal(kernel, problem, forced)
        trace.append((kernel.name, reason))
        if reason is None:
            return Choice(kernel, tuple(trace))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in trace)
    raise KernelUnavailableError(
        f"QUANTCORE_KERNEL={forced} cannot serve {problem}: {reasons}. Unset it, or use QUANTCORE_KERNEL=torch"
    )


def _refusal(kernel: Kernel, problem: Problem, forced: str | None) -> str | None:
    if forced is not None and forced not in (kernel.group, kernel.name):
        return f"excluded by QUANTCORE_KERNEL={forced}"
    return kernel.refuse(problem)


def candidates() -> tuple[Kernel, ...]:
    """Every kernel of the core, of the loaded backends and of the kernel plugins, highest priority first."""
    return _candidates(plugins(), plugins().generation)


@functools.lru_cache(maxsize=1)
def _candidates(loaded: Plugins, generation: int) -> tuple[Kernel, ...]:
    found = dict.fromkeys([REFERENCE, *loaded.kernels()])  # methods of one distribution may share a kernel
    return tuple(sorted(found, key=lambda kernel: -kernel.priority))
