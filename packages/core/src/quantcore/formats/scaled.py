"""The one format of scaled grids: codes of an element, under scales that blocks of a weight share.

A method that stores such weights says what stands in which tensor, by the fields of `Scaled`, and gets reading,
writing, splitting, the affine family, and a GPU decoder (`quantcore.kernels.triton.scaled`) for it. It overrides
`round_weight`, which chooses the numbers, and where the codes lie as no `Codes` says, `pack` and `unpack`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from quantcore.formats import scaled_families
from quantcore.formats.base import TensorSpec
from quantcore.formats.blocks import Block, block_abs_max, block_ends, each_block_, grid
from quantcore.formats.cutting import cuttable
from quantcore.formats.elements import Element, Float, Integer
from quantcore.formats.families import Affine, Family, ScaledFloat
from quantcore.formats.minifloat import E2M1, decode_fp4
from quantcore.formats.rounded import RoundedLayer
from quantcore.formats.row_chunks import row_chunks
from quantcore.formats.stored_codes import Codes, Outer, Scale, Zero, fitted_scales
from quantcore.formats.transforms import Transform

__all__ = ["Codes", "Float", "Integer", "Outer", "Parts", "Scale", "Scaled", "Zero"]

Numbers: TypeAlias = Callable[[slice, torch.dtype], Tensor]  # rows of a weight's codes as numbers of a dtype


class Parts(NamedTuple):
    """A weight as numbers: codes [N, K] of the element, and on the grid of blocks scale, as stored, and zero.

    zero: None, integers of the element, or floats in the units of values. outer: None, or the one scale above, float.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None


@dataclass(frozen=True)
class Scaled(RoundedLayer):
    """w = (code - zero) * scale, or code * scale + zero.

    block: rows and columns that share a scale, 0 for all. layout, scale, zero, outer: the stored tensors, in this
    order. index: None, or the name of an int32 [K] that holds each column's group, where groups are not runs. math:
    the dtype of the arithmetic, each step rounded: "float32", or "stored", that of scales that are plain floats.
    fills_blocks: whether the columns of a block must divide those of a weight.
    """

    has_decoder: ClassVar[bool] = True  # the one that is derived; a format that reads scales as no field says has none

    element: Element = Integer()
    block: Block = (1, 0)
    layout: Codes = Codes()
    scale: Scale = Scale()
    zero: Zero | None = None
    outer: Outer | None = None
    index: str | None = None
    math: str = "float32"
    fills_blocks: bool = True
    transform: Transform | None = dataclasses.field(default=None, kw_only=True)

    # What a method may override

    def round_weight(self, weight: Tensor) -> Parts:
        """The numbers that stand for a weight [N, K]: the nearest codes under the scales that its range asks for."""
        block, element = self.sides(weight.shape), self.element
        if self.zero is None:
            scale, outer = fitted_scales(self.scale, self.outer, self.element, block_abs_max(weight, block).float())
            return Parts(self.encode(weight, self.factors(scale, outer)), scale, None, outer)
        low, high = (end.float() for end in block_ends(weight, block))
        scale, outer = fitted_scales(self.scale, self.outer, self.element, high - low, element.high - element.low)
        factor = self.factors(scale, outer).float()
        if self.zero.in_values:
            zero = low - element.low * factor
            zero = (-zero if self.zero.is_subtracted else zero).to(self.zero.torch_dtype)
        else:
            zero = (element.low - low / factor).round_().clamp_(element.low, element.high)
            zero = zero.to(element.dtype)
        return Parts(self.encode(weight, factor, zero), scale, zero, outer)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """The stored tensors of codes [N, K]."""
        return {self.layout.name: self.layout.pack(codes, self.element)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Codes [N, K] of stored tensors, the inverse of `pack`."""
        return self.layout.unpack(tensors[self.layout.name], shape, self.element)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that `pack` gives."""
        along_n, along_k = self.layout.axes(self.element.bits)
        stored = self.layout.shape(shape, self.element.bits)
        return (TensorSpec(self.layout.name, self.layout.torch_dtype, stored, along_n=along_n, along_k=along_k),)

    # The stored tensors

    @property
    def has_own_layout(self) -> bool:
        """Whether codes lie as no `Codes` says, so that only `unpack` finds them."""
        return type(self).unpack is not Scaled.unpack

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return scaled_families.family_of(self)

    def sides(self, shape: tuple[int, ...] | torch.Size) -> Block:
        """Rows and columns of a block of a weight of this shape."""
        return self.block[0] or max(1, shape[0]), self.block[1] or max(1, shape[1])

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks there are down and across."""
        return grid(shape, self.sides(shape))

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = [*cuttable(self, self.code_specs(shape), shape), self.scale.spec(self.block, self.grid(shape))]
        if self.zero is not None:
            specs.append(self._zero_spec(self.zero, shape))
        if self.outer is not None:
            specs.append(self.outer.spec())
        if self.index is not None:
            specs.append(TensorSpec(self.index, torch.int32, (shape[1],)))
        by_rows, by_columns = self._splits(specs)
        cut = (
            replace(spec, along_n=spec.along_n if by_rows else None, along_k=spec.along_k if by_columns else None)
            for spec in specs
        )
        own = () if self.transform is None else self.transform.specs(shape[1])
        return (*cut, *own, *self.activation_specs())

    def check_shape(self, shape: tuple[int, ...]) -> None:
        columns = self.block[1]
        if self.fills_blocks and columns and shape[-1] % columns:
            raise ValueError(
                f"in_features {shape[-1]} is not a multiple of {columns}, the columns that share a scale; use a number "
                "that divides it, or skip this layer"
            )
        layout = None if self.has_own_layout else self.layout.layout(self.element.bits)
        name, size = ("in_features", shape[-1]) if self.layout.along == "k" else ("out_features", shape[0])
        if layout is not None and self.fills_blocks and size % layout.codes:
            raise ValueError(
                f"{name} {size} is not a multiple of {layout.codes}, the codes of {self.element.bits} bits that fill "
                f"{layout.words} {self.layout.dtype}; skip this layer"
            )

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        return [*super().value_faults(tensors, shape), *self.scale.value_faults(tensors)]

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        stored = tensors.get(self.layout.name)
        if stored is None or stored.ndim != 2:
            return None
        return self.layout.weight_shape(tuple(stored.shape), self.element.bits)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As `round_weight` says; what is stored of activations is 1 until calibration measures them."""
        if self.transform is not None:
            return self.quantize_transformed(weight)
        tensors = {**self.store(self.round_weight(weight)), **self.unmeasured(weight.device)}
        return {spec.name: tensors[spec.name] for spec in self.tensor_specs(tuple(weight.shape))}

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of a weight's numbers."""
        tensors = {**self.pack(parts.codes), self.scale.name: self.scale.store(parts.scale)}
        if self.zero is not None:
            zero = torch.zeros_like(parts.scale, dtype=self.zero_dtype) if parts.zero is None else parts.zero
            tensors[self.zero.name] = self.store_zero(zero)
        if self.outer is not None and parts.outer is not None:
            spec = self.outer.spec()
            tensors[spec.name] = parts.outer.to(spec.dtype).reshape(spec.shape)
        if self.index is not None:
            columns = torch.arange(parts.codes.shape[1], dtype=torch.int32, device=parts.codes.device)
            tensors[self.index] = columns // self.sides(parts.codes.shape)[1]
        return tensors

    def parts(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        """The numbers of stored tensors, the inverse of `store`."""
        zero = None if self.zero is None else self.load_zero(tensors[self.zero.name], self.grid(shape))
        outer = None if self.outer is None else tensors[self.outer.name]
        scale = self.scale.load(tensors[self.scale.name], self.grid(shape))
        return Parts(self.unpack(tensors, shape), scale, zero, outer)

    # Values

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """What codes are multiplied by: stored scales as floats, under the outer one."""
        factor = self.scale.decode(scale)
        if self.outer is not None and outer is not None:
            whole = outer.float().reshape(()) / self.outer.steps
            factor = factor.float() / whole if self.outer.divides else factor.float() * whole
        return factor if self.math == "stored" and self.scale.is_float else factor.float()

    def encode(self, weight: Tensor, factor: Tensor, zero: Tensor | None = None, *, reciprocal: bool = False) -> Tensor:
        """The codes [N, K] nearest to a weight in units of its factors [grid], shifted by its zeros; in float32.

        reciprocal: factors are what the weight is multiplied by, not what it is divided by.
        """
        block = self.sides(weight.shape)
        codes = torch.empty(weight.shape, dtype=self.element.dtype, device=weight.device)
        factor, zero = factor.float(), None if zero is None else zero.float()
        for rows in row_chunks(weight.shape):
            part = weight[rows].to(torch.float32, copy=True)
            if zero is not None and self._has_offset:
                each_block_(self._back, part, zero, block, rows)
            each_block_(Tensor.mul_ if reciprocal else Tensor.div_, part, factor, block, rows)
            if zero is not None and not self._has_offset:
                each_block_(Tensor.add_, part, zero, block, rows)
            codes[rows] = self.element.round(part)
        return codes

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        if self.transform is not None:
            return self.dequantize_transformed(tensors, shape, dtype)
        tables = self.tables(tensors, shape)
        return self._values(self._numbers(tensors, shape), shape, self.sides(shape), tables, dtype or self.own_dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows that rows number, each with the scales of its own blocks."""
        if not self.reads_rows_alone(shape) or self.transform is not None:
            return super().dequantize_rows(tensors, shape, rows, dtype)
        down, across = self.sides(shape)
        few, codes = (len(rows), shape[1]), tensors[self.layout.name].index_select(0, rows)
        numbers = self._numbers({**tensors, self.layout.name: codes}, few)
        return self._values(
            numbers, few, (1, across), self.tables(tensors, shape, rows // down), dtype or self.own_dtype
        )

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return self.layout.rows_apart and not self.has_own_layout

    @property
    def rows_apart(self) -> bool:  # type: ignore[override]
        return False  # `dequantize_rows` knows better

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype of the weight where none is asked for."""
        return self.scale.torch_dtype if self.scale.is_float else torch.float32

    def _numbers(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Numbers:
        """Rows of the stored codes as numbers."""
        stored, element = tensors.get(self.layout.name), self.element
        if self.has_own_layout or not self.layout.rows_apart or stored is None:
            codes = self.unpack(tensors, shape)
            return lambda rows, dtype: element.values(codes[rows], dtype)
        if isinstance(element, Float) and element.minifloat is E2M1 and self.layout.word_bits == 8:
            return lambda rows, dtype: decode_fp4(stored[rows], dtype)[:, : shape[1]]

        def numbers(rows: slice, dtype: torch.dtype) -> Tensor:
            own = stored[rows]
            return element.values(self.layout.unpack(own, (own.shape[0], shape[1]), element), dtype)

        return numbers

    def tables(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Factors and zeros [grid] in the dtype of the arithmetic, of some rows of the grid where rows are given."""
        grid = self.grid(shape)
        scale = self.scale.load(tensors[self.scale.name], grid)
        zero = None if self.zero is None else self.load_zero(tensors[self.zero.name], grid)
        if rows is not None:
            scale = scale.index_select(0, rows)
            zero = None if zero is None else zero.index_select(0, rows)
        factor = self.factors(scale, None if self.outer is None else tensors[self.outer.name])
        if self.index is not None:
            columns = tensors[self.index]
            factor = factor.index_select(1, columns)
            zero = None if zero is None else zero.index_select(1, columns)
        return factor, None if zero is None else zero.to(factor.dtype)

    def values(self, codes: Tensor, factor: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in dtype of codes under factors and zeros [grid], in arithmetic of the factors' dtype."""
        tables = factor, None if zero is None else zero.to(factor.dtype)
        numbers = lambda rows, own: self.element.values(codes[rows], own)  # noqa: E731
        return self._values(numbers, tuple(codes.shape), self.sides(codes.shape), tables, dtype)

    def _values(
        self,
        numbers: Numbers,
        shape: tuple[int, ...],
        block: Block,
        tables: tuple[Tensor, Tensor | None],
        dtype: torch.dtype,
    ) -> Tensor:
        """The weight [N, K] in dtype, a few rows at a time, each step rounded to the dtype of the tables."""
        factor, zero = tables
        block = block if self.index is None else (block[0], 1)
        weight = torch.empty(shape, dtype=dtype, device=factor.device)
        for rows in row_chunks(shape):
            part = numbers(rows, factor.dtype)
            if zero is not None and not self._has_offset:
                each_block_(Tensor.sub_, part, zero, block, rows)
            each_block_(Tensor.mul_, part, factor, block, rows)
            if zero is not None and self._has_offset:
                each_block_(self._forth, part, zero, block, rows)
            weight[rows] = part
        return weight

    # Families

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        if self.family is None:
            raise NotImplementedError(f"{self!r} lowers to no family")
        return scaled_families.lower(self, tensors, shape)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        parts = scaled_families.raised(self, family)
        tensors = self.store(parts)
        if self.index is not None and isinstance(family, Affine):
            tensors[self.index] = family.by_columns()[2]
        return {**tensors, **self.unrounded(parts.codes.device)}

    @property
    def solved_family(self) -> str | None:
        is_small_float = isinstance(self.element, Float) and self.zero is None and self.index is None
        return "scaled_float" if is_small_float else super().solved_family

    def solver_grid(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        """Small floats under one scale a block, with that above all others in it."""
        if self.solved_family != "scaled_float":
            return super().solver_grid(tensors, shape)
        return scaled_families.small_floats(self, tensors, shape)

    def store_solved(self, tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        if not isinstance(family, ScaledFloat):
            return super().store_solved(tensors, family)
        assert isinstance(self.element, Float)
        return {**tensors, **self.pack(self.element.from_bits(family.codes))}

    # Parts of the storage

    @property
    def _has_offset(self) -> bool:
        return self.zero is not None and self.zero.in_values

    @property
    def _forth(self) -> Callable[[Tensor, Tensor], Tensor]:
        return Tensor.sub_ if self.zero is not None and self.zero.is_subtracted else Tensor.add_

    @property
    def _back(self) -> Callable[[Tensor, Tensor], Tensor]:
        return Tensor.add_ if self.zero is not None and self.zero.is_subtracted else Tensor.sub_

    @property
    def zero_dtype(self) -> torch.dtype:
        """Of zeros as numbers."""
        if self.zero is not None and (self.zero.in_values or self.zero.torch_dtype.is_floating_point):
            return self.zero.torch_dtype
        return self.element.dtype

    def store_zero(self, numbers: Tensor) -> Tensor:
        """Zeros [grid] as they are stored."""
        zero = self.zero
        assert zero is not None
        if not zero.is_packed:
            return zero.store(numbers.to(zero.torch_dtype))
        raw = zero.store(self.element.to_bits(numbers.contiguous()))
        return self.layout.pack_line(raw, self.element.bits, zero.line)

    def load_zero(self, stored: Tensor, grid: tuple[int, int]) -> Tensor:
        """Zeros [grid] of what is stored; the inverse of `store_zero`."""
        zero = self.zero
        assert zero is not None
        if not zero.is_packed:
            return zero.load(stored, grid)
        raw = self.layout.unpack_line(stored, self.element.bits, grid[0], zero.line)
        return self.element.from_bits(zero.load(raw, grid))

    def _zero_spec(self, zero: Zero, shape: tuple[int, ...]) -> TensorSpec:
        spec = zero.spec(self.block, self.grid(shape))
        layout = self.layout.layout(self.element.bits) if zero.is_packed else None
        if layout is None:
            return spec
        line, whole = zero.line, self.layout.whole_codes(self.element.bits)
        size = list(spec.shape)
        size[line] = layout.count_words(size[line])
        along_n = spec.along_n and (line, whole * spec.along_n[1]) if whole else None
        return dataclasses.replace(spec, dtype=self.layout.torch_dtype, shape=tuple(size), along_n=along_n)

    def _splits(self, specs: list[TensorSpec]) -> tuple[bool, bool]:
        """Whether all stored tensors can be cut along N, and along K, with sums that are complete before rounding."""
        codes = specs[0]
        packs_zero = self.zero is not None and self.zero.is_packed and self.layout.whole_codes(self.element.bits) == 0
        by_columns = codes.along_k is not None and self.index is None and self.output is None
        return codes.along_n is not None and not packs_zero, by_columns
