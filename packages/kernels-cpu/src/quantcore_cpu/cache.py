"""Packed weights beside the tensors they were made of: made at the first product, gone with the tensors.

Of a layer that is prepared, its own tensors are the packed weight, and nothing is kept here but where they lie.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from quantcore.sdk import Prepared, WeightFormat
from quantcore_cpu import units
from quantcore_cpu.families import NotPackable, pack_family
from quantcore_cpu.packed import NativeWeight, PackedWeight

_Key = tuple[WeightFormat, tuple[int, int], int]
_State = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Entry:
    """A packed weight, or why there is none, and what it was made of: storages, addresses and versions."""

    storages: tuple[StorageWeakRef, ...]
    state: _State
    packed: PackedWeight | NativeWeight | str

    @property
    def is_alive(self) -> bool:
        return not any(storage.expired() for storage in self.storages)

    @property
    def weight(self) -> NativeWeight | str:
        return self.packed.native if isinstance(self.packed, PackedWeight) else self.packed


_entries: dict[_Key, _Entry] = {}
_lock = threading.Lock()


def packed_weight(
    operands: Sequence[Tensor], weight_format: WeightFormat, shape: tuple[int, int]
) -> NativeWeight | str:
    """The packed form of a weight [N, K] by its operands on a CPU, or why it has none."""
    key, state = (weight_format, shape, operands[0].data_ptr()), _state(operands)
    entry = _entries.get(key)
    if entry is not None and entry.state == state and entry.is_alive:
        return entry.weight
    with _lock:  # two threads at the same layer pack it once
        entry = _entries.get(key)
        if entry is None or entry.state != state or not entry.is_alive:
            entry = _Entry(_storages(operands), state, _pack(operands, weight_format, shape))
            _drop_dead()
            _entries[key] = entry
    return entry.weight


def packed_bytes() -> int:
    """Memory of every packed weight whose tensors are alive, less those that are held by prepared layers."""
    with _lock:
        _drop_dead()
        return sum(entry.packed.nbytes for entry in _entries.values() if isinstance(entry.packed, PackedWeight))


def _pack(
    operands: Sequence[Tensor], weight_format: WeightFormat, shape: tuple[int, int]
) -> PackedWeight | NativeWeight | str:
    named = dict(zip(weight_format.operand_names(shape), (part.detach() for part in operands), strict=True))
    if isinstance(weight_format, Prepared):
        return units.weight_of(named, shape) if units.is_packed(named) else "the layer holds what it stores"
    try:
        return pack_family(weight_format.lower_operands(named, shape))
    except NotPackable as error:
        return str(error)


def _drop_dead() -> None:
    for key in [key for key, entry in _entries.items() if not entry.is_alive]:
        del _entries[key]


def _state(operands: Sequence[Tensor]) -> _State:
    """Where operands lie, in which storages, and how often they were written to; in inference mode nothing counts that.

    A storage may be emptied and filled again, and its memory serve another meanwhile: the address alone tells nothing.
    """
    return tuple(
        (part.data_ptr(), part.untyped_storage()._cdata, 0 if part.is_inference() else part._version)
        for part in operands
    )


def _storages(operands: Sequence[Tensor]) -> tuple[StorageWeakRef, ...]:
    return tuple(StorageWeakRef(part.untyped_storage()) for part in operands)
