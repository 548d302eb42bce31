"""Finished parts of a block are not computed again.

Where a module returns what its last layer gave (attention its output projection, an MLP its second layer), it need not
run once that layer is finished: the layer's input, kept when it was measured, gives the module's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantcore.calibration.activations import ActivationStore
from quantcore.calibration.replay import forward_as
from quantcore.calibration.trees import unflatten

_MOST_BYTES = 2 << 30  # kept in one block; what exceeds it is computed again


@dataclass(frozen=True)
class ReusableOutput:
    """A module that returns the output of a layer inside of it. skeleton: what it returns, without the tensor."""

    module: str
    layer: str
    skeleton: Any


class ReusableOutputs:
    """Kept inputs of layers that end a module; each is exchanged for the layer's output when that is first needed."""

    def __init__(
        self, model: nn.Module, reusable: Mapping[str, ReusableOutput], new_store: Callable[[], ActivationStore]
    ) -> None:
        self._model, self._reusable, self._new_store = model, reusable, new_store
        self._kept: dict[str, ActivationStore] = {}
        self._numbers: dict[str, set[int]] = {}
        self._bytes = 0

    def open(self, layers: Collection[str]) -> set[str]:
        """Begin to keep the inputs of those of the layers that end a module; returns which."""
        opened = {layer for layer in layers if layer in self._reusable}
        for layer in opened:
            self._kept[layer], self._numbers[layer] = self._new_store(), set()
        return opened

    def keep(self, layer: str, number: int, x: Tensor) -> None:
        """Keep the input of an opened layer in one sample, unless there is no room, or it is called twice."""
        if layer not in self._kept:
            return
        self._bytes += x.nbytes
        if number in self._numbers[layer] or self._bytes > _MOST_BYTES:
            del self._kept[layer], self._numbers[layer]
            return
        self._kept[layer].put(number, (False, x))
        self._numbers[layer].add(number)

    def forget(self) -> None:
        """Let go of everything: the block was changed."""
        self._kept, self._numbers, self._bytes = {}, {}, 0

    def finished(self, unfinished: Collection[str]) -> list[ReusableOutput]:
        """The kept reusable of modules in which every layer is finished, given the names of the layers that are not."""
        parents = {name[:end] for name in unfinished for end, letter in enumerate(name) if letter == "."}
        return [self._reusable[layer] for layer in self._kept if self._reusable[layer].module not in parents]

    @contextlib.contextmanager
    def shortcuts(self, reusable: Collection[ReusableOutput], number: int) -> Iterator[None]:
        """A block in which the modules of some reusable are not computed for a sample, where their input was kept."""
        with contextlib.ExitStack() as stack:
            for output in reusable:
                if number in self._numbers[output.layer]:
                    module = self._model.get_submodule(output.module)
                    stack.enter_context(forward_as(module, self._output(output, number)))
            yield

    def _output(self, output: ReusableOutput, number: int) -> Callable[..., Any]:
        def give(*args: Any, **kwargs: Any) -> Any:
            store = self._kept[output.layer]
            is_output, tensor = store[number]
            if not is_output:
                tensor = self._model.get_submodule(output.layer)(tensor)
                store.put(number, (True, tensor))
            return unflatten([tensor], output.skeleton)

        return give
