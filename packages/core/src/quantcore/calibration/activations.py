"""Activations between blocks: kept in memory or in files; tensors that all forward passes have alike are kept once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcore.calibration.replay import Invocation
from quantcore.calibration.trees import flatten, main_tensor, unflatten


@dataclass(frozen=True)
class Sample:
    """The arguments of a block in one forward pass of the model.

    number: of the pass. mask: [B, T] bool, which tokens count, None for all of them. target: the hidden states that
    the float block gives on float inputs, where the quantizer asked for `source = "both"`.
    """

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    target: Tensor | None = None


class ActivationStore(Protocol):
    """Where structures of tensors are put by number."""

    def put(self, number: int, tree: Any) -> None: ...

    def __getitem__(self, number: int) -> Any: ...

    def drop(self, number: int) -> None: ...


class MemoryStore:
    """Keeps the tensors themselves; nothing is copied."""

    def __init__(self) -> None:
        self._trees: dict[int, Any] = {}

    def put(self, number: int, tree: Any) -> None:
        self._trees[number] = tree

    def __getitem__(self, number: int) -> Any:
        return self._trees[number]

    def drop(self, number: int) -> None:
        del self._trees[number]


class DiskStore:
    """Keeps the tensors of each number in a safetensors file, which is deleted when they are dropped."""

    def __init__(self, directory: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(dir=directory))
        self._skeletons: dict[int, tuple[Any, list[torch.device]]] = {}

    def put(self, number: int, tree: Any) -> None:
        tensors, skeleton = flatten(tree)
        self._skeletons[number] = skeleton, [tensor.device for tensor in tensors]
        save_file({str(index): _own_memory(tensor) for index, tensor in enumerate(tensors)}, self._file(number))

    def __getitem__(self, number: int) -> Any:
        skeleton, devices = self._skeletons[number]
        stored = load_file(self._file(number))
        return unflatten((stored[str(index)].to(device) for index, device in enumerate(devices)), skeleton)

    def drop(self, number: int) -> None:
        del self._skeletons[number]
        self._file(number).unlink()

    def _file(self, number: int) -> Path:
        return self._directory / f"{number}.safetensors"


class Samples(Sequence[Sample]):
    """The samples of a block, each loaded when it is asked for.

    Tensors that a sample has in common with the first one by value, such as masks and rotary tables, are those of the
    first one: the same objects.
    """

    def __init__(
        self, store: ActivationStore, masks: Sequence[Tensor | None], targets: ActivationStore | None = None
    ) -> None:
        self._shelf, self._masks, self._targets = store, masks, targets
        self._first: list[Tensor] = []
        self._entries: list[tuple[Any, list[int]]] = []  # structure without tensors, positions of shared ones

    def add(self, call: Invocation) -> None:
        """Append the sample of the next forward pass."""
        tensors, skeleton = flatten((call.args, call.kwargs))
        if not self._entries:
            self._first = tensors
        alike = zip(tensors, self._first, strict=False)
        shared = [index for index, (tensor, first) in enumerate(alike) if _equal(tensor, first)]
        self._shelf.put(len(self._entries), [tensor for index, tensor in enumerate(tensors) if index not in shared])
        self._entries.append((skeleton, shared))

    def drop(self, number: int) -> None:
        """Let go of the tensors of a sample that is not needed any more."""
        self._shelf.drop(number)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        skeleton, shared = self._entries[number]
        own = iter(self._shelf[number])
        count = len(flatten(skeleton)[0])
        tensors = (self._first[index] if index in shared else next(own) for index in range(count))
        args, kwargs = unflatten(tensors, skeleton)
        target = None if self._targets is None else main_tensor(self._targets[number])
        return Sample(number, args, kwargs, self._masks[number], target)


def join_samples(samples: Sequence[Sample]) -> Sample:
    """Several samples of one row as one sample of a larger batch, for solvers that train.

    Tensors are joined along dimension 0, but for those that the samples share, such as rotary tables.
    """
    first = samples[0]
    parts = [(sample.args, sample.kwargs, sample.mask, sample.target) for sample in samples]
    columns = zip(*(flatten(part)[0] for part in parts), strict=True)
    joined = (column[0] if all(tensor is column[0] for tensor in column) else torch.cat(column) for column in columns)
    args, kwargs, mask, target = unflatten(joined, flatten(parts[0])[1])
    return Sample(first.number, args, kwargs, mask, target)


def _equal(tensor: Tensor, first: Tensor) -> bool:
    if tensor is first:
        return True
    alike = tensor.shape == first.shape and tensor.dtype == first.dtype and tensor.device == first.device
    return alike and bool(torch.equal(tensor, first))


def _own_memory(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, and writes the whole of it.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def token_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Activations [..., K] as [tokens, K], without the tokens that a mask [B, T] leaves out of x [B, T, K]."""
    if mask is not None and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])
