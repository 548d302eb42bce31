"""Running a model only as far as a block, with the blocks before it short-circuited.

No class of model is known here. Each finished block gives what the last finished block of its list gave, until the
wanted block is reached and its arguments are caught. So masks, positions, rotary tables and whatever else a model hands
to its blocks are right for each of them, and all that is kept between blocks is one output for each forward pass.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from quantcore.calibration.data import ModelInputs

Enter = Callable[[str, tuple[Any, ...], dict[str, Any]], None]
Leave = Callable[[str, Any], None]


@dataclass(frozen=True)
class Invocation:
    """How a module was called, and what it returned where that is known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class Numbered(Protocol):
    """Outputs by the number of the forward pass."""

    def __getitem__(self, number: int, /) -> Any: ...


class _Reached(BaseException):
    """Ends a forward pass at the block that was wanted; no `except Exception` of a model may catch it."""


class Replay:
    """A model, its finished blocks, and for each list of blocks the outputs of the last finished one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._finished: dict[str, str] = {}  # block -> list
        self._outputs: dict[str, Numbered] = {}  # list -> outputs, by number of the forward pass
        self._number = 0

    def finish(self, block: str, trunk: str, outputs: Numbered) -> None:
        """Note what a block gave in each forward pass; the outputs of the one before it in its list are let go."""
        self._finished[block] = trunk
        self._outputs[trunk] = outputs

    @contextlib.contextmanager
    def shortcuts(self) -> Iterator[None]:
        """A block in which finished blocks are not computed."""
        with contextlib.ExitStack() as stack:
            for name, trunk in self._finished.items():
                stack.enter_context(forward_as(self._model.get_submodule(name), self._last_output(trunk)))
            yield

    def catch(self, block: str, inputs: ModelInputs, number: int) -> Invocation:
        """The arguments of a block in one forward pass. To be called inside of `shortcuts`.

        Raises RuntimeError when the pass does not reach it.
        """
        caught: list[Invocation] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            caught.append(Invocation(args, kwargs))
            raise _Reached

        with forward_as(self._model.get_submodule(block), stop), contextlib.suppress(_Reached):
            self.run(inputs, number)
        if not caught:
            raise RuntimeError(
                f"{block} is not reached in forward pass {number}, though it was in the first; give data"
            )
        return caught[0]

    def run(self, inputs: ModelInputs, number: int) -> Any:
        """The model's output in one forward pass. To be called inside of `shortcuts`."""
        self._number = number
        return run_model(self._model, inputs)

    def _last_output(self, trunk: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._outputs[trunk][self._number]


def run_model(model: nn.Module, inputs: ModelInputs) -> Any:
    """One forward pass without a cache. Token ids alone go by position where the model does not name them."""
    devices = (parameter.device for parameter in model.parameters())
    device = next((device for device in devices if device.type != "meta"), None)  # of what is there by now
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if set(inputs) == {"input_ids"} and not _takes(model, "input_ids"):
        return model(inputs["input_ids"])
    has_cache = hasattr(getattr(model, "config", None), "use_cache") and _takes(model, "use_cache")
    options = {"use_cache": False} if has_cache else {}
    return model(**{**options, **inputs})


@contextlib.contextmanager
def watch(model: nn.Module, names: Collection[str], enter: Enter, leave: Leave | None = None) -> Iterator[None]:
    """A block in which calls of the named modules are told: their arguments, and what they return."""
    handles = []
    for name in names:
        module = model.get_submodule(name)
        tell = _before(name, enter)
        handles.append(module.register_forward_pre_hook(tell, with_kwargs=True))
        if leave is not None:
            handles.append(module.register_forward_hook(_after(name, leave)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(name: str, enter: Enter) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, args, kwargs: enter(name, args, kwargs)


def _after(name: str, leave: Leave) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, args, output: leave(name, output)


def _takes(model: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())


@contextlib.contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """A block in which a module computes something else; it stays in place, for models read its attributes."""
    attributes = vars(module)
    had_own, own = "forward" in attributes, attributes.get("forward")
    attributes["forward"] = function
    try:
        yield
    finally:
        del attributes["forward"]
        if had_own:
            attributes["forward"] = own
