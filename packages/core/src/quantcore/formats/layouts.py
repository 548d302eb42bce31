"""Layouts of a kernel's own: operands of a weight packed anew, in place of the stored tensors, and exactly undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.formats.base import Description, TensorSpec, WeightFormat

if TYPE_CHECKING:
    from quantcore.formats.families import Family
    from quantcore.formats.transforms import Transform

Shape = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class Layout(Description):
    """Base of the layouts: a frozen dataclass of literals, declared at the top of a module.

    Functions get the format without its transform. They are plain torch, for `unpack` may run on any device.
    """

    def replaces(self, weight_format: WeightFormat, shape: Shape) -> tuple[str, ...]:
        """Names of the operands that are packed, by default those of the weight alone; the others stay as they are."""
        return weight_format.weight_alone().operand_names(shape)

    def packed_names(self, weight_format: WeightFormat, shape: Shape) -> tuple[str, ...]:
        """Names of what `pack` gives, in the order in which kernels read it."""
        raise NotImplementedError(f"{type(self).__name__} defines no packed_names")

    def pack(self, operands: Mapping[str, Tensor], weight_format: WeightFormat, shape: Shape) -> dict[str, Tensor]:
        """The operands that `replaces` names, packed: tensors of any dtype and shape, sharing no memory with them."""
        raise NotImplementedError(f"{type(self).__name__} defines no pack")

    def unpack(self, packed: Mapping[str, Tensor], weight_format: WeightFormat, shape: Shape) -> dict[str, Tensor]:
        """The exact inverse of `pack`: every operand with its dtype, shape and bits."""
        raise NotImplementedError(f"{type(self).__name__} defines no unpack")


@dataclass(frozen=True)
class Prepared(WeightFormat):
    """A weight whose operands a kernel has packed: the same numbers, under operands of other names.

    The format by which a prepared layer calls the ops. Kernels that know the layout serve it; any other is refused, and
    the reference unpacks. Nothing is stored by it: that is the affair of the weight's own format.
    """

    weight: WeightFormat
    layout: Layout

    @property
    def transform(self) -> Transform | None:
        return self.weight.transform

    def untransformed(self) -> WeightFormat:
        return self if self.transform is None else Prepared(self.weight.untransformed(), self.layout)

    def weight_alone(self) -> WeightFormat:
        """The weight's own in a layer that rounds no activations, under the layout still."""
        alone = self.weight.weight_alone()
        return self if alone is self.weight else Prepared(alone, self.layout)

    def tensor_specs(self, shape: Shape) -> tuple[TensorSpec, ...]:
        return self.weight.tensor_specs(shape)

    def operand_names(self, shape: Shape) -> tuple[str, ...]:
        return _operand_names(self, tuple(shape))

    def unpacked(self, operands: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """The operands as the weight's own format reads them, in its order."""
        plain = self.weight.untransformed()
        found = {**operands, **self.layout.unpack(operands, plain, shape)}
        return {name: found[name] for name in self.weight.operand_names(shape)}

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight.dequantize(self.unpacked(tensors, shape), shape, dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.weight.dequantize_rows(self.unpacked(tensors, shape), shape, rows, dtype)

    def reads_rows_alone(self, shape: Shape) -> bool:
        return False  # all of it is unpacked

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return self.weight.linear(x, self.unpacked(operands, shape), bias, shape)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        return self.weight.round_activation(side, x, operands)

    @property
    def rounds_rows_apart(self) -> bool:
        return self.weight.rounds_rows_apart

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return self.weight.compute_torch_dtype

    def lower(self, tensors: Mapping[str, Tensor], shape: Shape) -> Family:
        raise NotImplementedError("lower the weight's own format, over the stored tensors")


@lru_cache(maxsize=1024)
def _operand_names(prepared: Prepared, shape: Shape) -> tuple[str, ...]:
    """The packed operands, and then those of the weight that are not packed."""
    plain = prepared.weight.untransformed()
    packed = set(prepared.layout.replaces(plain, shape))
    rest = (name for name in prepared.weight.operand_names(shape) if name not in packed)
    return (*prepared.layout.packed_names(plain, shape), *rest)
