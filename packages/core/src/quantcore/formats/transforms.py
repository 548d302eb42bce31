"""What a layer does to its input before the product: rotations, permutations and scales of columns, as descriptions.

A transform is linear: x [..., K] becomes x M, with a matrix M [K, K] that is never made. The layer multiplies x M by
the stored weight V [N, K], and so computes x W^T with W = V M^T, the weight in the layer's own basis. The gradient for
x is g V M^T. Hence the three functions of a `Transform`: `apply` (x M), `transpose` (g M^T, V M^T), and `absorb`
(V = W M^-T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from quantcore.formats.base import Description, TensorSpec, float_dtype
from quantcore.formats.hadamard import (
    check_hadamard_order,
    hadamard_blocks,
    hadamard_matrix,
    multiply_blocks,
    sequency_matrix,
)

_INTEGERS = {"int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True, repr=False)
class Transform(Description):
    """Base of the transforms. features: K. tensors: what the layer stores, by suffix; a transform reads its own.

    Results have the shape, dtype and device of what is transformed; arithmetic is in float32, or wider where that is.
    `apply` may leave the result in float32, for a layer that rounds it next; the layer's output has x's dtype all the
    same.
    """

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        """What the layer stores for it, for the format's `tensor_specs`. Raises ValueError where K does not fit."""
        return ()

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        """The tensors of `specs` for a layer that is quantized anew."""
        return {}

    def block(self, features: int) -> int:
        """How many neighbouring columns it mixes: a part of the columns is turned alone where it holds whole blocks."""
        return features

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """x [..., K] as it is multiplied by the stored weight."""
        raise NotImplementedError(f"{type(self).__name__} defines no apply")

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The transposed map: of a gradient [..., K] for `apply`'s result, or of the stored weight, which gives W."""
        raise NotImplementedError(f"{type(self).__name__} defines no transpose")

    def absorb(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight V to store for a weight W [N, K]; for an orthogonal M the same as `apply`."""
        return self.apply(weight, tensors)


@dataclass(frozen=True, repr=False)
class Hadamard(Transform):
    """Blocks of size columns (0: all K in one), each times the orthogonal Hadamard matrix of `formats.hadamard`.

    signs: the suffix of a stored tensor [K] of +1 and -1 by which x is multiplied first, None for none; those of a
    layer that is quantized anew are drawn from seed. signs_dtype: of that tensor, a float dtype by name.
    """

    size: int = 0
    signs: str | None = None
    signs_dtype: str = "float32"
    seed: int = 0

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        size = self.size or features
        _check_blocks(features, size)
        check_hadamard_order(size)
        if self.signs is None:
            return ()
        return (TensorSpec(self.signs, float_dtype(self.signs_dtype, "signs_dtype"), (features,), along_k=(0, 1)),)

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        if self.signs is None:
            return {}
        draws = torch.randint(2, (features,), generator=torch.Generator("cpu").manual_seed(self.seed), device="cpu")
        dtype = float_dtype(self.signs_dtype, "signs_dtype")
        return {self.signs: (1 - 2 * draws).to(device, dtype)}

    def block(self, features: int) -> int:
        return self.size or features

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        signed = x if self.signs is None else x * tensors[self.signs].to(x.dtype)
        return hadamard_blocks(signed, self.size or x.shape[-1])

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        turned = hadamard_blocks(x, self.size or x.shape[-1], transposed=True)
        return turned if self.signs is None else turned * tensors[self.signs].to(x.dtype)


@dataclass(frozen=True, repr=False)
class BlockMatrix(Transform):
    """Blocks of size columns, each times one stored matrix M [size, size].

    matrix: its suffix; dtype: a float dtype by name. start: what a layer that is quantized anew gets: "hadamard",
    "sequency" (its columns by number of sign changes), or "identity". is_transposed: the matrix stored is M^T.
    is_signs: +-1 is stored, and divided by size**0.5. is_orthogonal: M^T is M's inverse. order: None, or the suffix of
    the stored order [size], int64, in which rows and columns of the matrix are taken.
    """

    matrix: str = "matrix"
    size: int = 0
    dtype: str = "float32"
    start: str = "hadamard"
    is_transposed: bool = False
    is_signs: bool = False
    is_orthogonal: bool = True
    order: str | None = None

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        _check_blocks(features, self.size)
        matrix = TensorSpec(self.matrix, float_dtype(self.dtype, "dtype"), (self.size, self.size))
        return (matrix, *([] if self.order is None else [TensorSpec(self.order, torch.int64, (self.size,))]))

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        try:
            made = _STARTS[self.start](self.size)
        except KeyError:
            raise ValueError(f"BlockMatrix.start must be one of {', '.join(_STARTS)}, got {self.start!r:.60}") from None
        values = made.double() * self.size**0.5 if self.is_signs else made.double()
        values = values.t() if self.is_transposed else values
        matrix = values.to(device, float_dtype(self.dtype, "dtype")).contiguous()
        order = {} if self.order is None else {self.order: torch.arange(self.size, device=device)}
        return {self.matrix: matrix, **order}

    def block(self, features: int) -> int:
        return self.size

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return multiply_blocks(x, self._matrix(tensors), self._scale)

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return multiply_blocks(x, self._matrix(tensors).t(), self._scale)

    def absorb(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        if self.is_orthogonal:
            return self.apply(weight, tensors)
        inverse = torch.linalg.inv(self._matrix(tensors).double() * self._scale)
        return multiply_blocks(weight, inverse.t().to(torch.promote_types(weight.dtype, torch.float32)))

    def _matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        stored = tensors[self.matrix]
        if self.order is not None:
            stored = stored[tensors[self.order]][:, tensors[self.order]]
        return stored.t() if self.is_transposed else stored

    @property
    def _scale(self) -> float:
        return self.size**-0.5 if self.is_signs else 1.0


@dataclass(frozen=True, repr=False)
class Permutation(Transform):
    """Columns in another order: column k of the result is column order[k] of x.

    order: the suffix of the stored tensor [K], an order of 0 to K - 1; dtype: "int32" or "int64".
    """

    order: str = "perm"
    dtype: str = "int64"

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        if self.dtype not in _INTEGERS:
            raise ValueError(f"Permutation.dtype must be one of {', '.join(_INTEGERS)}, got {self.dtype!r:.60}")
        return (TensorSpec(self.order, _INTEGERS[self.dtype], (features,)),)

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        return {self.order: torch.arange(features, dtype=_INTEGERS[self.dtype], device=device)}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return x.index_select(-1, tensors[self.order])

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return x.index_select(-1, tensors[self.order].argsort())


@dataclass(frozen=True, repr=False)
class ColumnScale(Transform):
    """Columns times a stored factor each, or divided by it.

    scale: the suffix of the stored tensor, of K elements in the shape that is given (None: [K]; -1 stands for K);
    dtype: a float dtype by name. A layer that is quantized anew gets ones.
    """

    scale: str = "scale"
    dtype: str = "float32"
    shape: tuple[int, ...] | None = None
    divides: bool = False

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        shape = tuple(features if size == -1 else size for size in self.shape or (-1,))
        axis = (self.shape or (-1,)).index(-1) if -1 in (self.shape or (-1,)) else None
        along = None if axis is None else (axis, 1)
        return (TensorSpec(self.scale, float_dtype(self.dtype, "dtype"), shape, along_k=along),)

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        spec = self.specs(features)[0]
        return {self.scale: torch.ones(spec.shape, dtype=spec.dtype, device=device)}

    def block(self, features: int) -> int:
        return features if self.specs(features)[0].along_k is None else 1

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._scaled(x, tensors, divides=self.divides)

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(x, tensors)

    def absorb(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return self._scaled(weight, tensors, divides=not self.divides)

    def _scaled(self, x: Tensor, tensors: Mapping[str, Tensor], *, divides: bool) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        factor = tensors[self.scale].reshape(-1).to(dtype)
        return (x.to(dtype) / factor if divides else x.to(dtype) * factor).to(x.dtype)


@dataclass(frozen=True, repr=False)
class Chain(Transform):
    """Transforms one after the other, the first first."""

    steps: tuple[Transform, ...] = ()

    def specs(self, features: int) -> tuple[TensorSpec, ...]:
        return tuple(spec for step in self.steps for spec in step.specs(features))

    def create(self, features: int, device: torch.device) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for step in self.steps:
            made.update(step.create(features, device))
        return made

    def block(self, features: int) -> int:
        return math.lcm(*(step.block(features) for step in self.steps))

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return reduce(lambda value, step: step.apply(value, tensors), self.steps, x)

    def transpose(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return reduce(lambda value, step: step.transpose(value, tensors), reversed(self.steps), x)

    def absorb(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return reduce(lambda value, step: step.absorb(value, tensors), self.steps, weight)


def _check_blocks(features: int, size: int) -> None:
    if size < 1 or features % size:
        raise ValueError(f"in_features {features} is not a multiple of the rotation's block of {size} columns")


_STARTS: dict[str, Callable[[int], Tensor]] = {
    "hadamard": lambda size: hadamard_matrix(size).double() * size**-0.5,
    "sequency": lambda size: sequency_matrix(size).double() * size**-0.5,
    "identity": lambda size: torch.eye(size, dtype=torch.float64),
}
