"""Experts that are stored whole, by the format of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stacked(WeightFormat):
    """A 3-D weight of experts of which each tensor holds, along its first dimension, those of one expert after another.

    matrix: the format of one expert, as a weight [N, K]. is_transposed: whether the model's weight is [E, K, N]; else
    it is [E, N, K]. Subclasses whose tensors have more dimensions than those of one expert override `stacked_shape`.
    """

    matrix: WeightFormat
    is_transposed: bool = False

    def stacked_shape(self, spec: TensorSpec, shape: Shape) -> Shape:
        """Of the tensor that holds those of a spec of one expert, one after the other."""
        return (shape[0], *spec.shape)

    def matrix_shape(self, shape: Shape) -> Shape:
        """Of one expert, [N, K]."""
        _, rows, columns = shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    def tensor_specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(spec.name, spec.dtype, self.stacked_shape(spec, shape), is_packed=spec.is_packed)
            for spec in _specs(self.matrix, self.matrix_shape(shape))
        )

    def check_shape(self, shape: Shape) -> None:
        self.matrix.check_shape(self.matrix_shape(shape))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a weight in the model's orientation; one expert at a time is worked on."""
        stored = {
            spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=weight.device)
            for spec in self.tensor_specs(tuple(weight.shape))
        }
        for index, matrix in enumerate(weight):
            own = self.matrix.quantize(matrix.t() if self.is_transposed else matrix)
            for name, tensor in own.items():
                stored[name][index] = tensor.reshape(stored[name].shape[1:])
        return stored

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        return self.dequantize_rows(tensors, shape, torch.arange(shape[0], device="cpu"), dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The experts that rows number, in the model's orientation."""
        device = next(iter(tensors.values())).device
        found: Tensor | None = None
        for place, index in enumerate(rows.tolist()):
            matrix = self.matrix.dequantize(self.part(tensors, shape, index), self.matrix_shape(shape), dtype)
            if found is None:
                found = torch.empty((len(rows), *shape[1:]), dtype=matrix.dtype, device=device)
            found[place] = matrix.t() if self.is_transposed else matrix
        return torch.empty((0, *shape[1:]), dtype=dtype, device=device) if found is None else found

    def expert(
        self, tensors: Mapping[str, Tensor], shape: Shape, index: int, transposed: bool
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        return self.matrix, self.part(tensors, shape, index)

    def experts(
        self, tensors: Mapping[str, Tensor], shape: Shape, transposed: bool
    ) -> list[tuple[WeightFormat, dict[str, Tensor]]]:
        return [(self.matrix, part) for part in self.parts(tensors, shape)]

    def part(self, tensors: Mapping[str, Tensor], shape: Shape, index: int) -> dict[str, Tensor]:
        """The tensors of one expert as its format has them; views. Raises IndexError where there is no such expert."""
        specs = _specs(self.matrix, self.matrix_shape(shape))
        return {spec.name: tensors[spec.name][index].view(spec.shape) for spec in specs}

    def parts(self, tensors: Mapping[str, Tensor], shape: Shape) -> list[dict[str, Tensor]]:
        """As `part`, of every expert; a view is taken of each tensor, not of each expert."""
        specs = _specs(self.matrix, self.matrix_shape(shape))
        views = {spec.name: tensors[spec.name].view(shape[0], *spec.shape).unbind() for spec in specs}
        return [{name: views[name][index] for name in views} for index in range(shape[0])]

    def value_faults(self, tensors: Mapping[str, Tensor], shape: Shape) -> list[str]:
        inner = self.matrix_shape(shape)
        parts = enumerate(self.parts(tensors, shape))
        return [f"{fault}, expert {i}" for i, part in parts for fault in self.matrix.value_faults(part, inner)]

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return self.matrix.compute_torch_dtype


@lru_cache(maxsize=1024)
def _specs(matrix: WeightFormat, shape: Shape) -> tuple[TensorSpec, ...]:
    """The tensors of one expert, worked out once: they are asked for at every product."""
    return matrix.tensor_specs(shape)
