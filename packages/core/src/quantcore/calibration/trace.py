"""Who reads which tensor inside a block: found by the identity of tensors in one forward pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from quantcore.calibration.replay import watch
from quantcore.calibration.reuse import ReusableOutput
from quantcore.calibration.trees import flatten, leaves


@dataclass(frozen=True)
class InputGroup:
    """Layers that receive the very same tensor.

    layers: full names in the order of execution. source: the innermost module whose output the tensor is, None where
    it comes from an operation outside of modules or from outside of the block. readers: every module that receives the
    tensor, the layers and the modules around them included, in the order of execution; a tensor that also goes
    elsewhere than into modules (a residual connection) does not show that here.
    """

    layers: tuple[str, ...]
    source: str | None
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """order: every module of the block by full name, as it was entered. groups: in the order of execution."""

    order: tuple[str, ...]
    groups: tuple[InputGroup, ...]

    def stages(self, layers: Sequence[str]) -> list[tuple[str, ...]]:
        """The layers in the order to solve them in where each shall see what the finished ones give.

        Each stage is a group of layers with one input; those of experts that stand side by side are one stage. Layers
        that the traced pass did not reach stand with those of their kind, else in a last stage.
        """
        stages: dict[Any, list[str]] = {}
        stage_of: dict[str, Any] = {}
        for group in self.groups:
            key = tuple(_kind(name) for name in group.layers)
            stages.setdefault(key, []).extend(group.layers)
            stage_of |= dict.fromkeys(key, key)
        reached = {name for group in self.groups for name in group.layers}
        for name in layers:
            if name not in reached:
                stages.setdefault(stage_of.get(_kind(name)), []).append(name)
        return [tuple(names) for names in stages.values()]

    def group_of(self, layer: str) -> InputGroup | None:
        """The group of a layer; None when the traced pass did not reach it."""
        return next((group for group in self.groups if layer in group.layers), None)


def trace_module(
    model: nn.Module, name: str, layers: Sequence[str], run: Callable[[], Any]
) -> tuple[Trace, dict[str, ReusableOutput]]:
    """The trace of the module of a model, while `run` runs it once, and the modules inside that end with a layer."""
    recorder = _Recorder()
    prefix = f"{name}." if name else ""
    inside = {inner for inner, _ in model.named_modules() if inner.startswith(prefix) and inner != name}
    with watch(model, inside, recorder.enter, recorder.leave):
        run()
    return recorder.result(frozenset(layers)), recorder.reusable(frozenset(layers))


def _kind(name: str) -> str:
    """A layer's name without the number of its expert."""
    return re.sub(r"(expert\w*)\.\d+(?=\.|$)", r"\1.*", name)


class _Recorder:
    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, StorageWeakRef]] = {}  # identity -> number, while the memory is in use
        self._count = itertools.count()
        self._order: list[str] = []
        self._readers: dict[Any, list[str]] = {}
        self._sources: dict[Any, str | None] = {}
        self._outputs: list[tuple[str, Any, Any]] = []  # of modules that return one tensor, innermost first

    def enter(self, name: str, args: Any, kwargs: Any) -> None:
        self._order.append(name)
        for key in self._keys((args, kwargs)):
            self._readers.setdefault(key, []).append(name)
            self._sources.setdefault(key, None)  # it was there before any module returned it

    def leave(self, name: str, output: Any) -> None:
        tensors, skeleton = flatten(output)
        if len(tensors) == 1:
            self._outputs.append((name, (self._number(tensors[0]), tensors[0].shape), skeleton))
        for key in self._keys(output):
            self._sources.setdefault(key, name)

    def result(self, layers: frozenset[str]) -> Trace:
        groups = []
        for key, readers in self._readers.items():
            members = tuple(dict.fromkeys(name for name in readers if name in layers))
            if members:
                groups.append(InputGroup(members, self._sources[key], tuple(dict.fromkeys(readers))))
        return Trace(tuple(dict.fromkeys(self._order)), tuple(_first_of_each(groups)))

    def reusable(self, layers: frozenset[str]) -> dict[str, ReusableOutput]:
        """By layer, the outermost module around it that returns its output. Both are called once."""
        found: dict[str, ReusableOutput] = {}
        layer_of: dict[Any, str] = {}
        for name, tensor, skeleton in self._outputs:
            layer = layer_of.get(tensor)
            if name in layers:
                layer_of[tensor] = name
            elif layer is not None and layer.startswith(f"{name}.") and self._order.count(name) == 1:
                found[layer] = ReusableOutput(name, layer, skeleton)
        return {layer: output for layer, output in found.items() if self._order.count(layer) == 1}

    def _keys(self, tree: Any) -> list[int]:
        return list(dict.fromkeys(self._number(tensor) for tensor in leaves(tree)))

    def _number(self, tensor: Tensor) -> int:
        """A number for the values of a tensor; memory that is used again later holds other values."""
        identity = _identity(tensor)
        number, memory = self._known.get(identity, (-1, None))
        if memory is None or memory.expired():
            number = next(self._count)
            self._known[identity] = number, StorageWeakRef(tensor.untyped_storage())
        return number


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the same values in the same memory, whatever leading shape they are seen with."""
    view: Any = "contiguous" if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())
    last = tensor.shape[-1] if tensor.ndim else 0
    return tensor.device, tensor.data_ptr(), tensor.numel(), last, tensor.dtype, tensor._version, view


def _first_of_each(groups: list[InputGroup]) -> list[InputGroup]:
    """The groups without layers that an earlier group holds: of a layer called twice the first call counts."""
    seen: set[str] = set()
    kept = []
    for group in groups:
        members = tuple(name for name in group.layers if name not in seen)
        seen.update(members)
        if members:
            kept.append(InputGroup(members, group.source, group.readers))
    return kept
