"""The weights of a model that is never in memory as a whole: each part is read from a checkpoint when it is needed.

Blocks, and the linear layers and embeddings outside of them, come and go. All else, such as the last norm, is small, is
read once and stays.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.calibration.resume import digest_of
from quantcore.calibration.steps import holds_layers
from quantcore.checkpoints.apart import fused_in, taken_apart
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.stream import slots
from quantcore.memory import give_back_freed_memory
from quantcore.nn.layers import view_layer
from quantcore.nn.module import QuantizedModule

if TYPE_CHECKING:
    from quantcore.nn.planned import PlannedLayer

Place = tuple["weakref.ref[nn.Module]", str]  # a module, and its attribute


class StreamedWeights:
    """The tensors of a model on the meta device. See `ModelWeights`.

    model: with every layer to quantize as a module of its own; its meta tensors have the dtypes to read in. checkpoint:
    under the names of the model, where experts may be fused. in_turns: layers whose weight is there only while each
    runs, since the block around them is too large.
    Raises ValueError for tensors that neither the checkpoint nor the model holds.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, in_turns: Collection[str] = ()) -> None:
        self._model, self._checkpoint = model, checkpoint
        self._fused = fused_in(model)
        self._sources = self._find_sources()  # name in the model -> name in the checkpoint
        self._first: dict[str, str] = {}  # name in the model -> of those that share the tensor, one with a source
        self._empty: dict[str, Tensor] = {}
        self._places: dict[str, list[Place]] = {}
        self._loaded: dict[str, weakref.ref[Tensor]] = {}
        self._digests: dict[str, str] = {}
        self._find_tensors()
        self._in_turns = {self._first[f"{name}.weight"] for name in in_turns}
        for name in in_turns:
            self._watch(name)
        self._blocks = outermost_blocks(model)
        inside = tuple(f"{name}." for name in self._blocks)
        self._outside = [
            name
            for name, module in model.named_modules()
            if view_layer(module) is not None and not name.startswith(inside)
        ]
        named = {*self._blocks, *self._outside}
        self._with_own_forward = {name for name in named if "forward" in vars(model.get_submodule(name))}
        self._is_passing = False
        come_and_go = {*self._missing(named), *self._in_turns}
        self._put([name for name in self._empty if name not in come_and_go])
        self._loaded.clear()  # these stay

    def of(self, layers: Sequence[PlannedLayer]) -> Iterator[tuple[str, Tensor]]:
        by_tensor = {self._first[f"{layer.name}.weight"]: layer for layer in layers}
        for name, tensor in self.read(by_tensor):
            layer = by_tensor[name]
            is_rows = issubclass(layer.dense.kind, nn.Linear | nn.Embedding)
            yield layer.name, tensor if is_rows else tensor.t()
            del tensor

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the model by name, in its dtypes and in the order of the files."""
        wanted = {self._first[name]: name for name in names}
        stream = self._checkpoint.stream({self._sources[name] for name in wanted})
        for name, tensor in taken_apart(stream, self._fused):
            if name in wanted:
                found = tensor.to(self._empty[name].dtype)
                if name in self._in_turns and found.untyped_storage().nbytes() > found.nbytes:
                    found = found.clone()  # a part of a fused weight, which shall not stay
                if name not in self._digests:
                    self._digests[name] = digest_of(found)
                yield wanted[name], found
                del found
            del tensor

    def digests(self) -> dict[str, str]:
        for _ in self.read([name for name in self._empty if name not in self._digests]):
            pass
        return dict(self._digests)

    @contextlib.contextmanager
    def present(self, modules: Collection[str]) -> Iterator[None]:
        names = self._missing(modules)
        self._put(names)
        try:
            yield
        finally:
            self._take(names)
            give_back_freed_memory()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """As `ModelWeights` says; what is outside of blocks stays until the end, for the next pass."""
        if self._is_passing:
            yield
            return
        held: dict[str, list[str]] = {}
        handles: list[Any] = []
        for name in (*self._blocks, *self._outside):
            module = self._model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._entering(name, held)))
            if name in self._blocks:
                handles.append(module.register_forward_hook(self._leaving(name, held)))
        self._is_passing = True
        try:
            yield
        finally:
            self._is_passing = False
            for handle in handles:
                handle.remove()
            for names in held.values():
                self._take(names)

    def let_go(self, modules: Collection[str]) -> None:
        empty: dict[int, nn.Parameter] = {}
        for module in (part for name in modules for part in self._model.get_submodule(name).modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    module._parameters[name] = empty.setdefault(id(parameter), _emptied(parameter))
            if isinstance(module, QuantizedModule):  # what kernels derived
                module._buffers.update({name: _on_meta(buffer) for name, buffer in module._buffers.items()})

    # Between the checkpoint and the model

    def _find_sources(self) -> dict[str, str]:
        headers = self._checkpoint.headers
        return {part: name for name in headers for part, _ in taken_apart([(name, headers[name].empty())], self._fused)}

    def _find_tensors(self) -> None:
        shared: dict[int, list[str]] = {}
        targets = {name: slot for name, slot in slots(self._model).items() if slot.tensor.is_meta}
        for name, slot in targets.items():
            shared.setdefault(id(slot.tensor), []).append(name)
        away = {name: buffer for name, buffer in self._model.named_buffers() if buffer.is_meta and name not in targets}
        for names in (*shared.values(), *([name] for name in away)):
            first = next((name for name in names if name in self._sources), None)
            if first is None:
                raise ValueError(
                    f"{names[0]}: is on the meta device, and the checkpoint does not hold it; build the model so that "
                    "it has values, not under torch.device('meta')"
                )
            self._first |= dict.fromkeys(names, first)
            self._empty[first] = targets[first].tensor
            self._places[first] = [(weakref.ref(targets[name].module), targets[name].attribute) for name in names]

    def _missing(self, modules: Collection[str]) -> list[str]:
        """Tensors of modules, and of what is inside of them, that are not there, but for those that come in turns."""
        inside = tuple(f"{name}." for name in modules)
        found = dict.fromkeys(first for name, first in self._first.items() if name.startswith(inside))
        return [name for name in found if name not in self._loaded and name not in self._in_turns]

    def _put(self, names: Collection[str]) -> None:
        for name, tensor in self.read(names):
            empty = self._empty[name]
            is_parameter = isinstance(empty, nn.Parameter)
            value = nn.Parameter(tensor, requires_grad=empty.requires_grad) if is_parameter else tensor
            self._assign(name, value, lambda held: held is self._empty[name])  # noqa: B023 - called at once
            self._loaded[name] = weakref.ref(value)

    def _take(self, names: Collection[str]) -> None:
        """Tensors that are still where they were put are taken out; a solver may have replaced others."""
        for name in names:
            value = self._loaded.pop(name, lambda: None)()
            if value is not None:
                self._assign(name, self._empty[name], lambda held: held is value)  # noqa: B023 - called at once

    def _assign(self, name: str, value: Tensor, is_expected: Callable[[Any], bool]) -> None:
        for reference, attribute in self._places[name]:
            module = reference()
            if module is None:
                continue
            owner: dict[str, Any] = module._parameters if isinstance(value, nn.Parameter) else module._buffers
            if is_expected(owner.get(attribute)):
                owner[attribute] = value

    # While modules run

    def _watch(self, layer: str) -> None:
        """Have the weight of a layer there while it runs; one that is cut short keeps it until it has run again."""
        name = self._first[f"{layer}.weight"]

        def enter(module: nn.Module, args: Any) -> None:
            self._put([] if name in self._loaded else [name])

        module = self._model.get_submodule(layer)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(lambda module, args, output: self._take([name]))

    def _entering(self, name: str, held: dict[str, list[str]]) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            if "forward" in vars(module) and name not in self._with_own_forward:
                return  # it is finished, or its arguments alone are wanted: nothing of it is computed
            names = self._missing([name])
            self._put(names)
            held.setdefault(name, []).extend(names)

        return enter

    def _leaving(self, name: str, held: dict[str, list[str]]) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: self._take(held.pop(name, ()))


def outermost_blocks(model: nn.Module) -> list[str]:
    """Members of lists of modules with linear layers in them; none is inside of another."""
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = name.startswith(tuple(f"{block}." for block in found))
        if isinstance(module, nn.ModuleList) and not is_inside and not holds_layers(module):
            found += [f"{name}.{key}" for key, _ in module.named_children()]
    return found


def _emptied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_on_meta(parameter), requires_grad=False)


def _on_meta(tensor: Any) -> Any:
    return torch.empty_like(tensor, device="meta") if isinstance(tensor, Tensor) else tensor
