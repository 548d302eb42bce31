"""How SINQ stores one weight: packed codes, scales and zeros of rows within tiles, perhaps in 8 bits, and of columns.

Source: arXiv:2509.22944, in the safetensors layout of sinq 0.2.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Affine, Family, Grouping, TensorSpec, WeightFormat, float_dtype, transforms
from quantcore_hqq.packing import PACKINGS, pack, packed_rows, unpack, unpack_rows, word_dtype
from quantcore_hqq.sinq.config import Variant, variant_of
from quantcore_hqq.sinq.levels import LEVELS
from quantcore_hqq.sinq.small_scales import SCALE_ROWS, grow, shrink
from quantcore_hqq.sinq.solver import Solved, solve

PACKING_BY_BITS = {
    8: "8bit_u8",
    6: "6bit_32",
    5: "5bit_32",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
COLUMN_SCALE = "meta.scale2"
LEAST_TILE = 16
_PARTS = ("x", "s", "m")  # codes, scale, offset of scales and zeros in 8 bits


@dataclass(frozen=True)
class SinqTiles(WeightFormat):
    """w = (value of a code - zero) * scale * column scale, tile by tile, in float16 or float32.

    bits, group_size, method: as the files name them. is_square: whether tiles are squares; else they have all rows.
    compute_dtype: float16 rounds every step to it, others to float32; None follows the dtype asked for. tile: columns
    of a tile where they are not group_size. loose: the shape of codes that are stored a byte each, whatever their
    packing; None where they are packed. one_zero: the shape of the only zero, None where each row of a tile has one.
    """

    tells_shape: ClassVar[bool] = False

    bits: int | float = 4
    group_size: int = 64
    method: str = "sinq_quantAux"
    is_square: bool = False
    compute_dtype: str | None = None
    tile: int | None = None
    loose: tuple[int, ...] | None = None
    one_zero: tuple[int, ...] | None = None

    @property
    def variant(self) -> Variant:
        return variant_of(self.method)

    @property
    def packing(self) -> str:
        """Name of the layout of packed codes."""
        if self.bits not in PACKING_BY_BITS:
            raise ValueError(f"bits={self.bits} has no packing; use one of {', '.join(map(str, PACKING_BY_BITS))}")
        return PACKING_BY_BITS[self.bits]

    @property
    def code_bits(self) -> float:
        return float(self.bits)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = self._grouped(shape)
        codes = TensorSpec("W_q", word_dtype(self.packing), (packed_rows(rows, self.packing), columns), is_packed=True)
        if self.loose is not None:
            codes = TensorSpec("W_q", torch.uint8, self.loose, is_packed=True)
        zeros = 1 if self.one_zero is not None else rows
        return (
            codes,
            *self._row_specs("scale", rows, rows // SCALE_ROWS, shape),
            self._column_spec(shape),
            *self._row_specs("zero", zeros, 1, shape),
        )

    def _row_specs(self, name: str, count: int, ranges: int, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Scales or zeros: so many numbers, which in 8 bits share so many ranges."""
        if self.variant.has_small_scales:
            codes = TensorSpec(f"meta.{name}.x", torch.uint8, (count // max(1, ranges), ranges), is_packed=True)
            return (codes, *(TensorSpec(f"meta.{name}.{part}", torch.float16, (1, ranges)) for part in _PARTS[1:]))
        return (TensorSpec(f"meta.{name}", torch.float16, self.row_shape(name, shape)),)

    def row_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales or zeros as floats."""
        if name == "zero" and self.one_zero is not None:
            return self.one_zero
        rows, columns = self._grouped(shape)
        return (rows // columns, columns, 1) if self.is_square else (rows, 1)

    def _column_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        rows, columns = self._grouped(shape)
        form = (rows // columns, 1, columns) if self.is_square else (1, shape[1])
        return TensorSpec(COLUMN_SCALE, torch.float16, form)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        rows, columns = self._grouped(shape)
        if self.loose is None:
            packed_rows(rows, self.packing)
        if self.is_square and shape[0] % columns:
            raise ValueError(f"out_features {shape[0]} is not a multiple of the tile's {columns} rows; use tiling 1D")
        if self.variant.has_small_scales and rows % SCALE_ROWS:
            raise ValueError(
                f"a weight {list(shape)} has {rows} scales, which do not divide into {SCALE_ROWS} rows of 8-bit codes; "
                "use another group_size, or a method without quantAux"
            )

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the code matrix: a row for each row of each tile."""
        columns = self.tile or tile_width(shape[1], self.group_size, self.is_square)
        return math.prod(shape) // columns, columns

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.quantize_scaled(weight, None)

    def quantize_scaled(self, weight: Tensor, inputs: Tensor | None) -> dict[str, Tensor]:
        """The stored tensors of a weight [N, K], with input scales [K] that A-SINQ chose, or without."""
        shape = (weight.shape[0], weight.shape[1])
        solved = solve(weight, bits=self.bits, tile=self.tile_shape(shape), variant=self.variant, inputs=inputs)
        return self._stored(self._in_order(solved, shape), shape)

    def requantize(self, weight: Tensor, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Another weight has column scales of its own."""
        return self.quantize(weight)

    def tile_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a tile."""
        columns = self._grouped(shape)[1]
        return (columns if self.is_square else shape[0]), columns

    def _in_order(self, solved: Solved, shape: tuple[int, ...]) -> Solved:
        """What was solved tile by tile with codes [G, g], and all else in the shapes in which it is stored."""
        rows, columns = self.tile_shape(shape)
        codes = solved.codes.view(-1, shape[1] // columns, rows, columns).transpose(1, 2).reshape(-1, columns)
        if self.is_square:
            return solved._replace(codes=codes)
        scale, zero = (each.transpose(0, 1).reshape(-1, 1) for each in (solved.scale, solved.zero))
        return Solved(codes, scale, zero, solved.column_scale.reshape(1, -1))

    def _stored(self, found: Solved, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.loose is None:
            codes = pack(found.codes, self.packing)
        else:
            codes = found.codes.reshape(self.loose)
        made = {
            "W_q": codes,
            **self._row_numbers("scale", found.scale, SCALE_ROWS, shape),
            COLUMN_SCALE: found.column_scale,
            **self._row_numbers("zero", found.zero, found.zero.numel(), shape),
        }
        return {spec.name: made[spec.name].contiguous() for spec in self.tensor_specs(shape)}

    def _row_numbers(self, name: str, values: Tensor, rows: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if self.variant.has_small_scales:
            return {f"meta.{name}.{part}": found for part, found in zip(_PARTS, shrink(values, rows), strict=True)}
        return {f"meta.{name}": values.to(torch.float16).reshape(self.row_shape(name, shape))}

    # Reading

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return ("W_q", "scale", "zero", COLUMN_SCALE)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Codes, and scales and zeros of rows as floats."""
        found = {**tensors, "scale": _row_factors("scale", tensors), "zero": _row_factors("zero", tensors)}
        return {name: found[name] for name in self.operand_names(shape)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes = self._codes(tensors["W_q"], shape)
        rows = torch.arange(shape[0], device=codes.device)
        return self._values(codes, rows, tensors, shape, dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        grouped, columns = self._grouped(shape)
        across = shape[1] // columns
        own = (rows[:, None] * across + torch.arange(across, device=rows.device)).view(-1)
        if self.loose is None:
            codes = unpack_rows(tensors["W_q"], self.packing, grouped, own)
        else:
            codes = tensors["W_q"].view(-1, columns).index_select(0, own)
        return self._values(codes, rows, tensors, shape, dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return True

    def _values(
        self,
        codes: Tensor,
        rows: Tensor,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
    ) -> Tensor:
        """Some rows of the weight by the codes of their parts in each tile [R * K / g, g]."""
        own = self.own_dtype(dtype)
        steps = torch.float16 if self.variant.levels is not None else _steps_for(own)
        columns = self._grouped(shape)[1]
        place, tile = self._places(rows, shape)
        zero = tensors["zero"].reshape(-1).to(steps)
        zero = zero if self.one_zero is not None else zero[place][..., None]
        values = self._numbers(codes, steps).view(len(rows), -1, columns).sub_(zero)
        values.mul_(tensors["scale"].reshape(-1).to(steps)[place][..., None])
        if COLUMN_SCALE in self.operand_names(shape):
            values.mul_(tensors[COLUMN_SCALE].reshape(-1, columns).to(steps)[tile])
        return values.view(len(rows), shape[1]).to(own).to(dtype or own)

    def own_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype that the weight is rounded to before it is cast to the one asked for."""
        if self.compute_dtype is not None:
            return float_dtype(self.compute_dtype, "compute_dtype") if dtype is None else _narrowest(self, dtype)
        return dtype or (torch.bfloat16 if self.variant.levels is None else torch.float16)

    def _numbers(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        levels = self.variant.levels
        if levels is None:
            return codes.to(dtype)
        return torch.tensor(LEVELS[levels], dtype=dtype, device=codes.device)[codes.int()]

    def _places(self, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Which scale, and which tile, each part of some rows uses, [R, K / g] and [R or 1, K / g]."""
        columns = self._grouped(shape)[1]
        across = torch.arange(shape[1] // columns, device=rows.device)
        if not self.is_square:
            return rows[:, None] * len(across) + across, across[None]
        tile = (rows // columns)[:, None] * len(across) + across
        return tile * columns + (rows % columns)[:, None], tile

    def _codes(self, words: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Codes [G, g] uint8."""
        rows, columns = self._grouped(shape)
        return unpack(words, self.packing, rows) if self.loose is None else words.view(rows, columns)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with what the shapes of stored tensors say: tiles, packing, whether scales are in 8 bits."""
        words, columns = tensors.get("W_q"), tensors.get(COLUMN_SCALE)
        scale = tensors.get("meta.scale.x", tensors.get("meta.scale"))
        zero = tensors.get("meta.zero.x", tensors.get("meta.zero"))
        if words is None or columns is None or scale is None or zero is None:
            return self
        method = _with_small_scales(self.method, "meta.scale.x" in tensors)
        # A single tile is a strip and a square at once: what the config says decides.
        weights, is_square = math.prod(shape), columns.ndim == 3 and (len(columns) > 1 or self.is_square)
        width = _divided(weights, scale.numel(), "scale", shape)
        is_loose = words.numel() == weights and PACKINGS[self.packing].codes_per_word > 1
        has_one_zero = zero.numel() == 1 and scale.numel() > 1
        return sinq_format(
            self.bits,
            self.group_size,
            method,
            is_square=is_square,
            compute_dtype=self.compute_dtype,
            tile=None if width == self.group_size else width,
            loose=tuple(words.shape) if is_loose else None,
            one_zero=tuple(zero.shape) if has_one_zero else None,
        )


@dataclass(frozen=True)
class SinqStrips(SinqTiles):
    """Tiles of all rows, numbers as codes: an affine weight, whose columns are scaled with the layer's input."""

    family: ClassVar[str | None] = "affine"
    tells_shape: ClassVar[bool] = True

    transform: transforms.Transform | None = None

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = super().tensor_specs(shape)
        return specs if self.transform is not None else tuple(spec for spec in specs if spec.name != COLUMN_SCALE)

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        names = super().operand_names(shape)
        return names if self.transform is not None else names[:-1]

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        scale, columns = tensors.get("meta.scale.x", tensors.get("meta.scale")), tensors.get(COLUMN_SCALE)
        words = tensors.get("W_q")
        if scale is None or columns is None or words is None or columns.ndim != 2 or words.ndim != 2:
            return None
        return scale.numel() * words.shape[1] // columns.shape[1], columns.shape[1]

    @property
    def steps_dtype(self) -> torch.dtype:
        """The dtype that each step is rounded to."""
        return _steps_for(float_dtype(self.compute_dtype or "bfloat16", "compute_dtype"))

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        return self.lower_operands(self.operands(tensors, shape), shape)

    def lower_operands(self, operands: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        rows, columns = self._grouped(shape)
        scale, zero = (operands[name].reshape(-1).to(self.steps_dtype) for name in ("scale", "zero"))
        codes = self._codes(operands["W_q"], shape).view(shape)
        return Affine(codes, scale, zero.expand(rows).contiguous(), Grouping(columns), self.bits)

    def for_family(self, family: Family) -> WeightFormat:
        """The format whose steps are rounded as those of the family."""
        return self.replace(compute_dtype="float16" if family.dtype == torch.float16 else "float32")

    def raise_(self, family: Family) -> dict[str, Tensor]:
        """Codes under the same scales and zeros, with column scales of 1, where float16 and 8 bits hold them."""
        shape = tuple(family.shape)
        rows, columns = self._grouped(shape)
        if not isinstance(family, Affine) or family.grouping != Grouping(columns) or family.bits > self.bits:
            raise ValueError(
                f"{type(family).__name__} of {family.bits} bits in {getattr(family, 'grouping', None)} does not fit "
                f"{self!r}"
            )
        if family.dtype != self.steps_dtype:
            raise ValueError(f"scale is {family.dtype}, steps are in {self.steps_dtype}; the product would differ")
        scale, zero = family.scales(), family.zeros()
        if self.one_zero is not None and bool((zero == zero[0]).all()):
            zero = zero[:1]
        ones = torch.ones(1, shape[1], dtype=torch.float16, device=scale.device)
        codes = family.codes.reshape(rows, columns)
        stored = self._stored(Solved(codes, scale.view(-1, 1), zero.view(-1, 1), ones), shape)
        for name, wanted in (("scale", scale), ("zero", zero)):
            if not torch.equal(_row_factors(name, stored).reshape(-1).to(wanted.dtype), wanted):
                raise ValueError(f"{name}s are no numbers that {self.method} stores exactly")
        return stored


def sinq_format(
    bits: float,
    group_size: int,
    method: str,
    *,
    is_square: bool = False,
    compute_dtype: str | None = None,
    tile: int | None = None,
    loose: tuple[int, ...] | None = None,
    one_zero: tuple[int, ...] | None = None,
) -> SinqTiles:
    """The format of a weight that is stored so; the arguments are the fields of `SinqTiles`."""
    if is_square or variant_of(method).levels is not None:
        return SinqTiles(bits, group_size, method, is_square, compute_dtype, tile, loose, one_zero)
    scaled = transforms.ColumnScale(COLUMN_SCALE, "float16", (1, -1))
    return SinqStrips(bits, group_size, method, False, compute_dtype, tile, loose, one_zero, transform=scaled)


def tile_width(columns: int, group_size: int, is_square: bool) -> int:
    """Columns of a tile: group_size, or half of it and so on where that does not divide a strip's columns.

    Raises ValueError where no width of 16 and more does.
    """
    width = group_size
    while columns % width:
        width //= 2
        if is_square or width < LEAST_TILE:
            raise ValueError(
                f"in_features {columns} is not a multiple of group_size {group_size}"
                f"{'' if is_square else f', nor of halves of it down to {LEAST_TILE}'}; use another group_size"
            )
    return width


def _row_factors(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales or zeros of rows, float16, in the order in which they are stored."""
    plain = tensors.get(f"meta.{name}")
    return grow(*(tensors[f"meta.{name}.{part}"] for part in _PARTS)) if plain is None else plain


def _steps_for(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the steps of a layer that computes in dtype: its numbers meet those of float16."""
    return torch.promote_types(dtype, torch.float16)


def _narrowest(stored: SinqTiles, dtype: torch.dtype) -> torch.dtype:
    own = float_dtype(stored.compute_dtype or "float32", "compute_dtype")
    return own if own == torch.float16 else dtype


def _with_small_scales(method: str, has_small_scales: bool) -> str:
    if variant_of(method).has_small_scales == has_small_scales:
        return method
    return f"{method}_quantAux" if has_small_scales else method.replace("_quantAux", "")


def _divided(weights: int, count: int, name: str, shape: tuple[int, ...]) -> int:
    if not count or weights % count:
        raise ValueError(f"meta.{name}: {count} numbers do not divide a weight {list(shape)} into groups")
    return weights // count
