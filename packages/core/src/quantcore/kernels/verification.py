"""Kernels on trial: what nobody has run on a device yet is compared there with the reference before it is relied on.

A kernel in Triton is compiled on the user's machine, for a device and by a compiler that its author may never have had.
The first problem of a kind is therefore computed twice. Where the results differ, or the kernel fails, the reference
serves instead, and one warning says so. Neither a wrong number nor a crash reaches the user, and a kernel that works
costs one product more for each kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from quantcore import settings

logger = logging.getLogger(__name__)

# Both round each product's sum once, in another order, and may hold the weight in half precision: that lies far below.
# A tile read from the wrong place, a group with its neighbour's scale or a lost edge lies far above.
_MOST_ERROR = 0.02

_passed: set[Hashable] = set()
_failed: dict[Hashable, str] = {}
_generation = 0

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def may_use_triton(device: torch.device) -> bool:
    """Whether a Triton kernel that no dispatch chooses may be tried: on a GPU, unless QUANTCORE_KERNEL names others."""
    forced = settings.forced_kernel()
    return device.type == "cuda" and (forced == "triton" or (forced is None and find_spec("triton") is not None))


def fault(kernel: Hashable) -> str | None:
    """Why a kernel is not relied on any more, or None."""
    return _failed.get(kernel)


def failures() -> int:
    """How many kernels are not relied on any more."""
    return len(_failed)


def generation() -> int:
    """Changes whenever a kernel that was relied on may no longer be: a choice made at another one may be outdated."""
    return _generation


def has_passed(kernel: Hashable, kind: Hashable, device: torch.device) -> bool:
    """Whether `run` needs to compare nothing any more."""
    return (kernel, kind, device) in _passed


def run(
    kernel: Hashable,
    kind: Hashable,
    device: torch.device,
    fast: Callable[[], Result],
    slow: Callable[[], Result],
    most_error: float = _MOST_ERROR,
    inputs: Sequence[Tensor] = (),
) -> Result:
    """What fast gives, once it has given what slow gives for a problem of this kind; otherwise what slow gives.

    kernel: what a failure is held against, in any kind; its str is what the warning names. kind: what may take another
    path through the kernel, such as sizes and dtypes. most_error: of each result, the norm of its difference over its
    own norm; 0 asks for every bit. inputs: what fast may not change, and slow computes from; what was changed is put
    back. Errors of slow are the caller's own, and held against nobody.
    Under QUANTCORE_KERNEL nothing is tried: what fast raises or gives is seen.
    """
    if settings.forced_kernel() is not None:
        return fast()
    if kernel in _failed:
        return slow()
    if has_passed(kernel, kind, device) or _is_captured(device):
        return fast()
    found, failure = _attempt(fast, inputs)
    try:
        expected = slow()
        if found is not None:
            failure = _difference(found, expected, most_error)
    except torch.OutOfMemoryError:  # the reference takes more memory than the kernel; a smaller problem may come
        if found is None:
            raise
        return found
    if failure == "":
        _passed.add((kernel, kind, device))
        return found  # type: ignore[return-value]
    if failure is not None:
        _fail(kernel, device, failure)
    return expected


def _attempt(fast: Callable[[], Result], inputs: Sequence[Tensor]) -> tuple[Result | None, str | None]:
    """What fast gives, or None and why; the reason is None where memory ran out, which says nothing of the kernel."""
    found, failure = None, None
    try:
        before = [tensor.detach().clone() for tensor in inputs]
        found = fast()
    except torch.OutOfMemoryError:
        return None, None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - nothing says what a compiler raises on a device it does not know
        failure = f"{type(error).__name__}: {_first_line(error)}"
    if _put_back(inputs, before):
        return None, "it changes its inputs"
    if found is None and failure is None:
        failure = "it gives nothing"
    return found, failure


def _put_back(inputs: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Whether inputs hold other bytes than before, which they get again."""
    changed = [pair for pair in zip(inputs, before, strict=True) if not torch.equal(*map(_bytes, pair))]
    for tensor, kept in changed:
        tensor.detach().copy_(kept)
    return bool(changed)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def forget() -> None:
    """Try every kernel anew."""
    _passed.clear()
    _failed.clear()
    _change()


def _change() -> None:
    global _generation
    _generation += 1


def _fail(kernel: Hashable, device: torch.device, reason: str) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _failed[kernel] = f"failed on {name}: {reason}"
    _change()
    logger.warning(
        "kernel %s %s. The reference serves instead, which is right and slower. Please report this; "
        "QUANTCORE_KERNEL=torch tries no kernel",
        kernel,
        _failed[kernel],
    )


def _difference(found: Result, expected: Result, most_error: float) -> str | None:
    """What is wrong with a result: "" where nothing is, None where the one that is expected proves nothing."""
    forms = _form(found), _form(expected)
    if forms[0] != forms[1]:
        return f"its result is {forms[0]}, the reference's {forms[1]}"
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    errors = [_relative_error(*pair) for pair in pairs]
    known = [error for error in errors if error is not None]
    if known and max(known) > most_error:
        return f"its result is {max(known):.2g} from the reference's"
    return "" if len(known) == len(errors) else None


def _form(result: object) -> str:
    """Dtype, shape and device of each tensor of a result."""
    if isinstance(result, Tensor):
        return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)} on {result.device}"
    if isinstance(result, (tuple, list)):
        return ", ".join(map(_form, result))
    return f"a {type(result).__name__}"


def _relative_error(found: Tensor, expected: Tensor) -> float | None:
    """Norm of the difference over that of what is expected; None where this is 0 or not finite, and proves nothing.

    Integers are right or wrong: 0 or inf.
    """
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    norm = float(torch.linalg.vector_norm(expected, dtype=torch.float32))
    if norm in (0.0, float("inf")) or norm != norm:
        return None
    error = float(torch.linalg.vector_norm(found - expected, dtype=torch.float32)) / norm
    return error if error == error else float("inf")


def _is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, in which no number can be looked at."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def _first_line(failure: BaseException) -> str:
    return str(failure).strip().partition("\n")[0][:200]
