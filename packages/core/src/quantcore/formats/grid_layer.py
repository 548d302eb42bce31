"""Formats that describe their weight as one of the core's scaled grids, in words of their own method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec
from quantcore.formats.families import Family
from quantcore.formats.rounded import RoundedLayer
from quantcore.formats.scaled import Parts, Scaled


@dataclass(frozen=True)
class GridLayer(RoundedLayer):
    """A format that says in words of its own method which `Scaled` grid its weight is stored as.

    Subclasses define `describe_grid`, which is asked once for equal formats, and `round_weight`.
    """

    @property
    def grid_format(self) -> Scaled:
        """The stored weight, without what is rounded of activations."""
        return _grid_format(self)

    def describe_grid(self) -> Scaled:
        """Makes `grid_format`."""
        raise NotImplementedError(f"{type(self).__name__} defines no describe_grid")

    def round_weight(self, weight: Tensor) -> Parts:
        """The numbers that stand for a weight [N, K]."""
        return self.grid_format.round_weight(weight)

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype of the weight where none is asked for."""
        return self.grid_format.own_dtype

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return self.grid_format.family

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = self.grid_format.tensor_specs(shape)
        if self.output is not None:  # sums must be complete before they are rounded
            specs = tuple(dataclasses.replace(spec, along_k=None) for spec in specs)
        return (*specs, *self.activation_specs())

    def check_shape(self, shape: tuple[int, ...]) -> None:
        self.grid_format.check_shape(shape)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return self.grid_format.stored_shape(tensors)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        return [*super().value_faults(tensors, shape), *self.grid_format.scale.value_faults(tensors)]

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `round_weight` says; what is stored of activations is 1 until calibration measures them."""
        tensors = {**self.grid_format.store(self.round_weight(weight)), **self.unmeasured(weight.device)}
        return {spec.name: tensors[spec.name] for spec in self.tensor_specs(tuple(weight.shape))}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.grid_format.dequantize(tensors, shape, dtype or self.own_dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.is_plain_grid:
            return super().dequantize_rows(tensors, shape, rows, dtype)
        return self.grid_format.dequantize_rows(tensors, shape, rows, dtype or self.own_dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return self.is_plain_grid and self.grid_format.reads_rows_alone(shape)

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        if self.family is None:
            raise NotImplementedError(f"{self!r} lowers to no family")
        return self.grid_format.lower(tensors, shape)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        if self.family is None:
            raise NotImplementedError(f"{self!r} cannot be raised from a family")
        tensors = self.grid_format.raise_(family)
        return {**tensors, **self.unrounded(next(iter(tensors.values())).device)}

    @property
    def is_plain_grid(self) -> bool:
        """Whether the stored tensors are those of `grid_format`, for kernels to read."""
        return type(self).dequantize is GridLayer.dequantize


@lru_cache(maxsize=1024)
def _grid_format(layer: GridLayer) -> Scaled:
    return layer.describe_grid()
