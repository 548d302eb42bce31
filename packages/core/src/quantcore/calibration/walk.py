"""Which blocks a model has, and the inputs that each gets, found by running the model itself.

No class of model is known here. The model's own forward is run with the finished blocks short-circuited: each gives
what the last block of its list gave, until the wanted block is reached and its arguments are caught. So masks,
positions, rotary tables and whatever else a model hands to its blocks are right for each of them, and all that is kept
between blocks is one output for each forward pass.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.calibration.data import ModelInputs
from quantcore.calibration.trees import leaves
from quantcore.nn.dense import view_dense

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A block to solve, or what is outside of blocks.

    name: of the block; "" for layers outside of blocks, whose module is the whole model. trunk: number of the list
    that it stands in, -1 outside. layers: names of its layers.
    """

    name: str
    trunk: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Invocation:
    """How a module was called, and what it returned where that is known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class _Reached(BaseException):
    """Ends a forward pass at the block that was wanted; no `except Exception` of a model may catch it."""


class Walk:
    """A model, its steps in the order of execution, and the outputs of the blocks that were last finished.

    steps: every step with layers to solve, and the blocks without any that lie before one.
    """

    def __init__(self, model: nn.Module, passes: Sequence[ModelInputs], layers: Sequence[str], prefix: str | None):
        self.model = model
        self.passes = passes
        self.steps = _find_steps(model, passes[0], layers, prefix)
        self._last: dict[int, Any] = {}  # trunk -> outputs of its last finished block, for each pass
        self._finished: list[Step] = []

    def module(self, step: Step) -> nn.Module:
        return self.model.get_submodule(step.name)

    def catch(self, step: Step, number: int) -> Invocation:
        """The arguments of a step in one forward pass; those of the whole model outside of blocks."""
        if step.trunk < 0:
            return Invocation((), dict(self.passes[number]))
        caught: list[Invocation] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            caught.append(Invocation(args, kwargs))
            raise _Reached

        with self.shortcuts(number), _forward(self.module(step), stop), contextlib.suppress(_Reached):
            run_model(self.model, self.passes[number])
        if not caught:
            raise RuntimeError(f"{step.name} is not reached by the model's forward; it was in the first pass")
        return caught[0]

    @contextlib.contextmanager
    def shortcuts(self, number: int) -> Iterator[None]:
        """While the block runs, finished blocks give the last output of their list in this pass."""
        with contextlib.ExitStack() as stack:
            for step in self._finished:
                stack.enter_context(_forward(self.module(step), self._replay(step, number)))
            yield

    def finish(self, step: Step, outputs: Any) -> None:
        """Note the outputs of a block for each pass; those of the block before it in its list are let go."""
        if step.trunk >= 0:
            self._last[step.trunk] = outputs
            self._finished.append(step)

    def _replay(self, step: Step, number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._last[step.trunk][number]


def run_model(model: nn.Module, inputs: ModelInputs) -> Any:
    """One forward pass without a cache. Token ids alone go by position where the model does not name them."""
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    if set(inputs) == {"input_ids"} and not _names(model, "input_ids"):
        return model(inputs["input_ids"])
    return model(**{**options, **inputs})


def _names(model: nn.Module, argument: str) -> bool:
    import inspect

    parameters = inspect.signature(model.forward).parameters
    return argument in parameters or any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())


@contextlib.contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While the block runs, the module computes something else; it stays in place, for models read its attributes."""
    own = vars(module).get("forward")
    vars(module)["forward"] = function
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


# Finding the steps


def _find_steps(model: nn.Module, inputs: ModelInputs, layers: Sequence[str], prefix: str | None) -> tuple[Step, ...]:
    trunks = _candidates(model, layers, prefix)
    calls = _trace_calls(model, inputs, trunks, layers)
    usable = [trunk for trunk, blocks in enumerate(trunks) if _runs_in_order(blocks, calls)]
    blocks = {name: trunk for trunk in usable for name in trunks[trunk]}
    order = [name for name in calls.order if name in blocks]
    inside = {name: tuple(layer for layer in layers if layer.startswith(f"{name}.")) for name in order}
    outside = [layer for layer in layers if not any(layer.startswith(f"{name}.") for name in order)]
    steps = [Step(name, blocks[name], inside[name]) for name in order]
    while steps and not steps[-1].layers:
        steps.pop()
    first = calls.order.index(order[0]) if order else 0
    before = tuple(layer for layer in outside if layer in calls.order[:first])
    after = tuple(layer for layer in outside if layer not in before)
    head = [Step("", -1, before)] if before else []
    return (*head, *steps, *([Step("", -1, after)] if after else []))


def _candidates(model: nn.Module, layers: Sequence[str], prefix: str | None) -> list[list[str]]:
    """Names of the blocks of every outermost list of modules that holds layers."""
    if prefix is not None:
        return [_blocks_under(model, prefix)]
    found: list[list[str]] = []
    names: list[str] = []
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in names)
        if nested or not _is_list(module) or not any(layer.startswith(f"{name}.") for layer in layers):
            continue
        names.append(name)
        found.append([f"{name}.{key}" if name else key for key, _ in module.named_children()])
    return found


def _blocks_under(model: nn.Module, prefix: str) -> list[str]:
    try:
        children = list(model.get_submodule(prefix).named_children())
    except AttributeError:
        children = []
    if not children:
        lists = [name for name, module in model.named_modules() if _is_list(module)]
        raise ValueError(f"block_name_to_quantize {prefix!r} is no list of blocks of the model; it has {lists}")
    return [f"{prefix}.{key}" for key, _ in children]


def _is_list(module: nn.Module) -> bool:
    """Whether a module can be a list of blocks: not a list of plain layers, such as the experts of one layer."""
    if not isinstance(module, nn.ModuleList):
        return False
    return not any(view_dense(child) is not None for child in module.children())


@dataclass(frozen=True)
class _Calls:
    """order: names of blocks and layers as they were called; direct: blocks that got the output of the one before."""

    order: list[str]
    direct: frozenset[str]


def _trace_calls(
    model: nn.Module, inputs: ModelInputs, trunks: Sequence[Sequence[str]], layers: Sequence[str]
) -> _Calls:
    """The order of calls in one forward pass of the float model."""
    order: list[str] = []
    direct: set[str] = set()
    last: dict[int, list[Tensor]] = {}
    trunk_of = {name: trunk for trunk, blocks in enumerate(trunks) for name in blocks}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        order.append(name)
        if name not in trunk_of:
            return
        before = last.get(trunk_of[name])
        if before is None or any(tensor is known for tensor in leaves((args, kwargs)) for known in before):
            direct.add(name)

    def leave(name: str, output: Any) -> None:
        if name in trunk_of:
            last[trunk_of[name]] = list(leaves(output))

    with watch(model, {*trunk_of, *layers}, enter, leave), torch.no_grad():
        run_model(model, inputs)
    return _Calls(order, frozenset(direct))


@contextlib.contextmanager
def watch(
    model: nn.Module,
    names: set[str],
    enter: Callable[[str, Any, Any], None],
    leave: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """While the block runs, calls of the named modules are told: their arguments, and what they return."""
    handles = []
    for name, module in model.named_modules():
        if name not in names:
            continue
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
            )
        )
        if leave is not None:
            handles.append(module.register_forward_hook(lambda _, args, output, name=name: leave(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _runs_in_order(blocks: Sequence[str], calls: _Calls) -> bool:
    """Whether each block of a list is called once, with the output of the one before."""
    called = [name for name in calls.order if name in set(blocks)]
    return len(called) == len(set(called)) > 0 and set(called) <= calls.direct
