"""Choice of a kernel: every candidate is asked, and answers yes or why not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcore import settings
from quantcore.errors import KernelUnavailableError
from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.kernels import reference, trial
from quantcore.plugins.manager import Plugins, plugins


class Problem(NamedTuple):
    """What a kernel is asked for: op on a weight [N, K] and M rows of input.

    op: "linear", "linear_input_grad" or "grouped_linear", where M is the mean of the experts.
    """

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
    on_trial: its first result of each kind on a device is compared with the reference's, see `quantcore.kernels.trial`.
    """

    name: str
    group: str
    refuse: Callable[[Problem], str | None]
    linear: Callable[..., Tensor]
    linear_input_grad: Callable[..., Tensor]
    priority: int = 0
    on_trial: bool = False
    grouped_linear: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a problem, and each candidate that was asked with its answer (None: yes).

    proven: the devices on which the kernel has passed its trial for this problem.
    """

    kernel: Kernel
    trace: tuple[tuple[str, str | None], ...]
    proven: set[torch.device] = field(default_factory=set, compare=False)


REFERENCE = Kernel(
    name="reference",
    group="torch",
    refuse=lambda problem: None,
    linear=reference.linear,
    linear_input_grad=reference.linear_input_grad,
    priority=-1000,
    grouped_linear=reference.grouped_linear,
)


def compute(problem: Problem, *arguments: Any) -> Tensor:
    """The result of the chosen kernel; the reference's where a kernel on trial fails. arguments: those of the op."""

    def result_of(kernel: Kernel) -> Tensor:
        result: Tensor = getattr(kernel, problem.op)(*arguments)
        return result

    choice, device = choose(problem), arguments[0].device
    chosen = choice.kernel
    if not chosen.on_trial or device in choice.proven:
        return result_of(chosen)
    tried = _tried(chosen, problem)
    kind = ((problem.M - 1).bit_length(), problem.N, problem.K)  # rows as launches tell them apart
    result = trial.run(tried, kind, device, lambda: result_of(chosen), lambda: result_of(REFERENCE))
    if trial.has_passed(tried, kind, device):
        choice.proven.add(device)
    return result


class _Tried(NamedTuple):
    """What a failure in a trial is held against: the kernel for a format, at every size."""

    kernel: str
    op: str
    weight_format: WeightFormat
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel} ({self.op} of {self.weight_format!r}, {dtype_name(self.dtype)})"


def _tried(kernel: Kernel, problem: Problem) -> _Tried:
    return _Tried(kernel.name, problem.op, problem.weight_format, problem.device, problem.dtype)


def choose(problem: Problem) -> Choice:
    """The first kernel that accepts a problem, in order of priority, with the trace of the choice.

    Raises KernelUnavailableError when QUANTCORE_KERNEL names no kernel, or none that accepts, with every reason.
    """
    return _choose(problem, settings.forced_kernel(), plugins(), plugins().generation, trial.generation())


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None, loaded: Plugins, generation: int, trials: int) -> Choice:
    loaded.load_package(type(problem.weight_format).__module__.partition(".")[0])
    trace: list[tuple[str, str | None]] = []
    known = _candidates(loaded, loaded.generation)
    for kernel in known:
        reason = _refusal(kernel, problem, forced)
        trace.append((kernel.name, reason))
        if reason is None:
            return Choice(kernel, tuple(trace))
    if forced not in {name for kernel in known for name in (kernel.group, kernel.name)}:
        groups = ", ".join(sorted({kernel.group for kernel in known}))
        raise KernelUnavailableError(f"QUANTCORE_KERNEL={forced} names no kernel that is loaded; groups: {groups}")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in trace)
    raise KernelUnavailableError(
        f"QUANTCORE_KERNEL={forced} cannot serve {problem}: {reasons}. Unset it, or use QUANTCORE_KERNEL=torch"
    )


def _refusal(kernel: Kernel, problem: Problem, forced: str | None) -> str | None:
    if forced is not None and forced not in (kernel.group, kernel.name):
        return f"excluded by QUANTCORE_KERNEL={forced}"
    if getattr(kernel, problem.op) is None:
        return f"has no {problem.op}"
    fault = trial.fault(_tried(kernel, problem)) if kernel.on_trial and forced is None else None
    return fault or kernel.refuse(problem)


def candidates() -> tuple[Kernel, ...]:
    """Every kernel of the core, of the loaded backends and of the kernel plugins, highest priority first."""
    return _candidates(plugins(), plugins().generation)


@functools.lru_cache(maxsize=1)
def _candidates(loaded: Plugins, generation: int) -> tuple[Kernel, ...]:
    found = dict.fromkeys([REFERENCE, *loaded.kernels()])  # methods of one distribution may share a kernel
    return tuple(sorted(found, key=lambda kernel: -kernel.priority))
