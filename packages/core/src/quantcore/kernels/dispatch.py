"""Choice of a kernel: every candidate is asked, and answers yes or why not."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcore import settings
from quantcore.errors import KernelUnavailableError
from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.formats.grid_layer import GridLayer
from quantcore.formats.layouts import Layout, Prepared
from quantcore.formats.scaled import Scaled
from quantcore.kernels import reference, verification
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.plugins.manager import Plugins, plugins

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The kernel that serves a problem, and each candidate that was asked with its answer (None: yes).

    is_tried: whether its results are compared with the reference's before they are relied on. proven: the devices on
    which it has passed that trial for this problem.
    """

    kernel: Kernel
    trace: tuple[tuple[str, str | None], ...]
    is_tried: bool = False
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
    if not choice.is_tried or device in choice.proven:
        return result_of(chosen)
    tried = _tried(chosen, problem)
    kind = ((problem.M - 1).bit_length(), problem.N, problem.K)  # rows as launches tell them apart
    inputs = tuple(_tensors_of(arguments)) if _is_foreign(chosen, problem.weight_format) else ()
    result = verification.run(
        tried, kind, device, lambda: result_of(chosen), lambda: result_of(REFERENCE), inputs=inputs
    )
    if verification.has_passed(tried, kind, device):
        choice.proven.add(device)
    return result


def _is_foreign(kernel: Kernel, weight_format: WeightFormat) -> bool:
    """Whether a kernel comes neither from the core nor from the package that a format is of."""
    return kernel.package not in ("", "quantcore", _package_of(weight_format))


def _package_of(weight_format: WeightFormat) -> str:
    own = weight_format.weight if isinstance(weight_format, Prepared) else weight_format
    return type(own).__module__.partition(".")[0]


def _tensors_of(arguments: Any) -> Iterator[Tensor]:
    """The tensors among arguments and in their lists."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_of(argument)


class _Tried(NamedTuple):
    """What a failure in a trial is held against: the kernel for a format, at every size."""

    kernel: str
    provider: str
    op: str
    weight_format: WeightFormat
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        provider = f" of {self.provider}" if self.provider else ""
        return f"{self.kernel}{provider} ({self.op} of {self.weight_format!r}, {dtype_name(self.dtype)})"


def _tried(kernel: Kernel, problem: Problem) -> _Tried:
    return _Tried(kernel.name, kernel.provider, problem.op, problem.weight_format, problem.device, problem.dtype)


def choose(problem: Problem) -> Choice:
    """The first kernel that accepts a problem, in order of priority, with the trace of the choice.

    Raises KernelUnavailableError when QUANTCORE_KERNEL names no kernel, or none that accepts, with every reason.
    """
    return _choose(problem, settings.forced_kernel(), plugins(), plugins().generation, verification.generation())


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, forced: str | None, loaded: Plugins, generation: int, trials: int) -> Choice:
    loaded.load_package(_package_of(problem.weight_format))
    trace: list[tuple[str, str | None]] = []
    known = candidates(problem.weight_format)
    for kernel in known:
        reason = _refusal(kernel, problem, forced)
        trace.append((kernel.name, reason))
        if reason is None:
            is_tried = kernel.on_trial or _is_foreign(kernel, problem.weight_format)
            return Choice(kernel, tuple(trace), is_tried)
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
    fault = verification.fault(_tried(kernel, problem)) if forced is None else None
    return fault or _answer(kernel, problem)


def _answer(kernel: Kernel, problem: Problem) -> str | None:
    """What a kernel says to a problem; one that fails to say it is passed over."""
    try:
        answer = kernel.refuse(problem)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's kernel must not break another method
        return _passed_over(kernel, f"its refuse raises {type(error).__name__}: {error}")
    if answer is None or isinstance(answer, str):
        return answer
    return _passed_over(kernel, f"its refuse gives {type(answer).__name__}, not a reason or None")


@functools.lru_cache(maxsize=256)
def _passed_over(kernel: Kernel, reason: str) -> str:
    """The reason, which a warning names once."""
    logger.warning("kernel %s of %s is passed over: %s", kernel.name, kernel.provider or "quantcore", reason)
    return reason


def candidates(weight_format: WeightFormat | None = None) -> tuple[Kernel, ...]:
    """Every kernel of the core, of the loaded backends and of the kernel plugins, highest priority first.

    weight_format: adds those that the core has for its kind of format.
    """
    return _candidates(plugins(), plugins().generation, isinstance(weight_format, Scaled | GridLayer))


def layout_for(weight_format: WeightFormat, shape: tuple[int, ...], device: torch.device) -> Layout | None:
    """The layout that the first kernel with one for such a weight wants it in; None where all read it as it is stored.

    A kernel that QUANTCORE_KERNEL does not name is not asked.
    """
    plugins().load_package(_package_of(weight_format))
    forced, plain = settings.forced_kernel(), weight_format.untransformed()
    for kernel in candidates(plain):
        if kernel.layout is None or forced not in (None, kernel.group, kernel.name):
            continue
        layout = _layout_of(kernel, plain, shape, device)
        if layout is not None:
            return layout
    return None


def _layout_of(
    kernel: Kernel, weight_format: WeightFormat, shape: tuple[int, ...], device: torch.device
) -> Layout | None:
    """The layout that a kernel wants; None from one that fails to say it."""
    assert kernel.layout is not None
    try:
        layout: object = kernel.layout(weight_format, shape, device)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - as in `_answer`
        _passed_over(kernel, f"its layout raises {type(error).__name__}: {error}")
        return None
    if layout is None or isinstance(layout, Layout):
        return layout
    _passed_over(kernel, f"its layout gives {type(layout).__name__}, not a Layout or None")
    return None


@functools.lru_cache(maxsize=2)
def _candidates(loaded: Plugins, generation: int, is_scaled: bool) -> tuple[Kernel, ...]:
    from quantcore.kernels.triton.kernels import scaled_kernels  # which come after the reference of this module

    # Methods of one distribution may share a kernel.
    found = dict.fromkeys([REFERENCE, *(scaled_kernels() if is_scaled else ()), *loaded.kernels(Kernel)])
    return tuple(sorted(found, key=lambda kernel: -kernel.priority))
