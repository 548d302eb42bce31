"""How the stored tensors of a weight are cut along N or K, and how parts are joined again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantcore.formats.base import TensorSpec
    from quantcore.formats.scaled import Scaled


class Opened(Protocol):
    """The numbers of a stored tensor, whose axes a spec's along_n and along_k count. `close` undoes `open`.

    Numbers that `close` gets may be fewer, of a part of the weight; what it gives needs the stored dtype and order of
    elements, not the shape.
    """

    def open(self, stored: Tensor) -> Tensor: ...

    def close(self, numbers: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Reshaped:
    """The elements themselves in another shape, for tensors that are stored flat."""

    shape: tuple[int, ...]

    def open(self, stored: Tensor) -> Tensor:
        return stored.reshape(self.shape)

    def close(self, numbers: Tensor) -> Tensor:
        return numbers


@dataclass(frozen=True)
class OpenedCodes:
    """Codes [N, K] of a scaled grid, for words that do not hold whole codes of neighbours alone.

    name: of the one tensor that the codes of a weight of this shape are stored as.
    """

    weight_format: Scaled
    shape: tuple[int, ...]
    name: str

    def open(self, stored: Tensor) -> Tensor:
        return self.weight_format.unpack({self.name: stored}, self.shape)

    def close(self, numbers: Tensor) -> Tensor:
        return self.weight_format.pack(numbers)[self.name]


def cuttable(weight_format: Scaled, specs: Sequence[TensorSpec], shape: tuple[int, ...]) -> list[TensorSpec]:
    """The specs of a weight's codes, opened where they do not themselves run along both N and K."""
    if len(specs) != 1 or (specs[0].along_n and specs[0].along_k):
        return list(specs)
    opened = OpenedCodes(weight_format, shape, specs[0].name)
    return [dataclasses.replace(specs[0], along_n=(0, 1), along_k=(1, 1), opened=opened)]


def cut(tensor: Tensor, spec: TensorSpec, part: TensorSpec, *, along_n: bool, first: int, count: int) -> Tensor:
    """What a stored tensor holds of count rows (along_n) or columns from the first, in memory of its own.

    spec, part: of the tensor for the whole weight and for the part. What does not run along the cut is whole.
    """
    axis_and_step = spec.along_n if along_n else spec.along_k
    if axis_and_step is None:
        return tensor.clone()
    axis, step = axis_and_step
    numbers = tensor if spec.opened is None else spec.opened.open(tensor)
    numbers = numbers.narrow(axis, first // step, count // step).clone(memory_format=torch.contiguous_format)
    return _closed(numbers, spec, part)


def join(tensors: Sequence[Tensor], parts: Sequence[TensorSpec], spec: TensorSpec, *, along_n: bool) -> Tensor:
    """The stored tensor of a whole weight of those of its parts, in order; the inverse of `cut`."""
    axis_and_step = spec.along_n if along_n else spec.along_k
    if axis_and_step is None:
        return tensors[0]
    numbers = [
        tensor if part.opened is None else part.opened.open(tensor) for tensor, part in zip(tensors, parts, strict=True)
    ]
    return _closed(torch.cat(numbers, axis_and_step[0]), spec, spec)


def _closed(numbers: Tensor, spec: TensorSpec, part: TensorSpec) -> Tensor:
    """Numbers as they are stored, in the shape that a spec gives them."""
    return numbers if spec.opened is None else spec.opened.close(numbers).reshape(part.shape).contiguous()
