"""A block within a bound of memory: its layers are read, measured and solved in turns where it is larger as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.calibration.statistics import Hessian
from quantcore.nn.dense import DenseLinear, view_dense
from quantcore.nn.planned import PlannedLayer

if TYPE_CHECKING:
    from quantcore.formats.base import WeightFormat


class AwayLinear(DenseLinear):
    """A layer whose weight is read each time it is asked for; nothing of it is kept. empty: the layer without values.

    Its shape needs no reading.
    """

    def __init__(self, empty: DenseLinear, read: Callable[[], Tensor]) -> None:
        vars(self).update(bias=empty.bias, kind=empty.kind, _shape=empty.shape, _read=read)

    @property
    def weight(self) -> Tensor:
        found: Tensor = vars(self)["_read"]()
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        found: tuple[int, ...] = vars(self)["_shape"]
        return found


@dataclass(frozen=True)
class BlockMemory:
    """What a float block takes while it is calibrated, in bytes, and what it may take.

    name: of the block. layers: those to solve. rest: all else of the block. itemsize: of a weight's value.
    max_bytes: for the block and what is measured and solved of it at once.
    """

    name: str
    layers: tuple[PlannedLayer, ...]
    rest: int
    itemsize: int
    max_bytes: int

    @classmethod
    def of(cls, model: nn.Module, name: str, layers: Sequence[PlannedLayer], max_bytes: int) -> BlockMemory:
        """Of a block of a model in which no layer was replaced yet; its tensors may be on the meta device."""
        block = model.get_submodule(name)
        total = sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
        itemsize = max(tensor.itemsize for tensor in block.parameters())
        weights = itemsize * sum(math.prod(layer.dense.shape) for layer in layers)
        return cls(name, tuple(layers), max(0, total - weights), itemsize, max_bytes)

    @property
    def weights(self) -> int:
        """Bytes of the float weights to solve."""
        return self.itemsize * sum(math.prod(layer.dense.shape) for layer in self.layers)

    @property
    def fits(self) -> bool:
        """Whether the block may be there as a whole: its weights, and once more where they are computed with."""
        return self.rest + 2 * self.weights + self._working(_side_by_side(self.layers)) <= self.max_bytes

    @property
    def is_away(self) -> bool:
        """Whether weights are read when they are needed."""
        return any(isinstance(layer.dense, AwayLinear) for layer in self.layers)

    def turns(self, names: Collection[str], groups: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
        """The names in parts to measure and solve one after the other.

        names: of layers of which none reads what another one gives. groups: all layers of the block, those with one
        input together. Raises ValueError naming the smallest bound that holds what any one group takes.
        """
        planned = {layer.name: layer for layer in self.layers}
        members = [[planned[name] for name in group] for group in groups]
        least = self.rest + (0 if self.is_away else 2 * self.weights) + self._working(members)
        if least > self.max_bytes:
            largest = max(members, key=self._solving)[0].name
            raise ValueError(
                f"max_memory {self.max_bytes}: block {self.name} takes {least} bytes at least, with what is measured "
                f"and solved of {largest}; give max_memory={least} or more"
            )
        turns: list[list[str]] = []
        room = 0
        for group in members:
            own = [layer.name for layer in group if layer.name in names]
            if not own:
                continue
            size = _statistic(group)
            if not turns or size > room:
                turns.append([])
                room = self.max_bytes - least + size  # the statistic of one group is in `least`
            turns[-1] += own
            room -= size
        return [tuple(turn) for turn in turns]

    def _working(self, groups: Iterable[Sequence[PlannedLayer]]) -> int:
        """What the block takes besides: its quantized form, and that again while it is stored or a group is solved."""
        specs = (layer.weight_format.tensor_specs(layer.dense.shape) for layer in self.layers)
        packed = sum(spec.nbytes for each in specs for spec in each)
        return packed + max([packed, *map(self._solving, groups)])

    def _solving(self, group: Sequence[PlannedLayer]) -> int:
        """Of layers that are solved as one weight: their statistic, three matrices [K, K], the weight and its codes."""
        rows, columns = sum(layer.dense.shape[0] for layer in group), group[0].dense.shape[1]
        return _statistic(group) + 3 * 4 * columns**2 + rows * columns * (4 + self.itemsize)


def layers_in_turns(
    model: nn.Module, blocks: Iterable[str], formats: Mapping[str, WeightFormat], max_bytes: int
) -> list[str]:
    """Names of the layers of the blocks that are too large to be there as a whole. formats: of each layer to solve."""
    found: list[str] = []
    for block in blocks:
        layers = [
            PlannedLayer(name, dense, weight_format)
            for name, weight_format in formats.items()
            if name.startswith(f"{block}.") and (dense := view_dense(model.get_submodule(name))) is not None
        ]
        if layers and not BlockMemory.of(model, block, layers, max_bytes).fits:
            found += [layer.name for layer in layers]
    return found


def _side_by_side(layers: Iterable[PlannedLayer]) -> list[list[PlannedLayer]]:
    """Layers of one module with as many inputs: those that may have the same input, and be solved as one."""
    groups: dict[Any, list[PlannedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.name.rpartition(".")[0], layer.dense.shape[1]), []).append(layer)
    return list(groups.values())


def _statistic(group: Sequence[PlannedLayer]) -> int:
    return Hessian.nbytes(group[0].dense.shape[1])
