"""How one weight is stored: rows of blocks of one type, as files of llama.cpp hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Family, Reshaped, TensorSpec, WeightFormat, float_dtype
from quantcore_misc.gguf.blocks import dequantize_rows
from quantcore_misc.gguf.families import family_of, lower, raised
from quantcore_misc.gguf.grids import DECODERS, grid
from quantcore_misc.gguf.quantize import quantize_rows
from quantcore_misc.gguf.types import block_type

_GRID = "grid"  # the operand of kernels that is no stored tensor


@dataclass(frozen=True)
class GgufWeight(WeightFormat):
    """A weight of one block type: `weight`, uint8 [N, bytes of a row].

    type: the name of the block type. dtype: of the weight that was quantized. importance: of each column, float [K],
    for a weight that is to be quantized; no part of what the format is.
    """

    rows_apart: ClassVar[bool] = True

    type: str = "Q4_K"
    dtype: str = "float32"
    importance: Tensor | None = field(default=None, compare=False, repr=False)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        kind, stored = block_type(self.type), (*shape[:-1], self._row_bytes(shape[-1]))
        in_blocks = Reshaped((*shape[:-1], stored[-1] // kind.nbytes, kind.nbytes))
        by_blocks = (len(shape) - 1, kind.elements)
        return (TensorSpec("weight", torch.uint8, stored, along_n=(0, 1), along_k=by_blocks, opened=in_blocks),)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        block_type(self.type).row_bytes(shape[-1])

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> dict[str, Tensor]:
        """As the base says. importance: of each column, float [K], not negative; None for the format's own."""
        wanted = self.importance if importance is None else importance
        return {"weight": quantize_rows(weight, self.type, wanted)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return dequantize_rows(tensors["weight"], self.type, dtype or float_dtype(self.dtype, "dtype"))

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return super().operand_names(shape) + ((_GRID,) if self.type in DECODERS else ())

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The rows, and for types of vectors the table of these, int8 [count, 8 or 4]."""
        stored = {"weight": tensors["weight"]}
        if self.type not in DECODERS:
            return stored
        return {**stored, _GRID: grid(self.type, tensors["weight"].device).to(torch.int8)}

    @property
    def family(self) -> str | None:  # type: ignore[override]
        """That of the block type; None for types of vectors, and of digits of base 3."""
        return family_of(self.type)

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        if self.family is None:
            raise NotImplementedError(f"{self.type} lowers to no family")
        return lower(tensors["weight"], self.type, shape)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        return {"weight": raised(family, self.type)}

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is None or weight.ndim < 2 or weight.dtype != torch.uint8:
            return None
        return (*weight.shape[:-1], block_type(self.type).row_elements(weight.shape[-1]))

    def _row_bytes(self, columns: int) -> int:
        """Bytes of a row, of which the last block may be cut short in shapes that `check_shape` refuses."""
        kind = block_type(self.type)
        return -(-columns // kind.elements) * kind.nbytes
