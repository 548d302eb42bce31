"""Where the float weights of a model are while it is calibrated: in the model, or in files that are read in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from quantcore.calibration.resume import digest_of

if TYPE_CHECKING:
    from quantcore.nn.planned import PlannedLayer


class ModelWeights(Protocol):
    """What calibration asks of whatever holds the weights of a model. Modules are given by name.

    Some layers may have a weight only while they run: of those `of` gives it.
    """

    def of(self, layers: Sequence[PlannedLayer]) -> Iterator[tuple[str, Tensor]]:
        """Name and weight [N, K] of planned layers, one at a time in any order."""

    def digests(self) -> dict[str, str]:
        """A digest of some values of every tensor, by name."""

    def present(self, modules: Collection[str]) -> contextlib.AbstractContextManager[None]:
        """A block in which the tensors of modules, and of all that is inside of them, are there."""

    def passing(self) -> contextlib.AbstractContextManager[None]:
        """A block in which the tensors of a module are there while it runs."""

    def let_go(self, modules: Collection[str]) -> None:
        """Modules are finished: what they hold is stored elsewhere, and they do not run again."""


class ResidentWeights:
    """The weights of a model that holds them all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def of(self, layers: Sequence[PlannedLayer]) -> Iterator[tuple[str, Tensor]]:
        return ((layer.name, layer.dense.weight) for layer in layers)

    def digests(self) -> dict[str, str]:
        return {name: digest_of(tensor) for name, tensor in self._model.state_dict().items()}

    def present(self, modules: Collection[str]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def passing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def let_go(self, modules: Collection[str]) -> None:
        """The model keeps what it has."""
