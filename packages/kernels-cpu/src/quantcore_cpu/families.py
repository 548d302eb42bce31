"""How each family of weights is packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from quantcore.sdk import Affine, Family, Grouping, Lookup, ScaledFloat, minifloat
from quantcore_cpu.layout import Columns, by_blocks, group_columns, plain_rows, rows_by_residue
from quantcore_cpu.library import FLOAT, TABLE
from quantcore_cpu.packed import Element, Factors, PackedWeight, pack_codes

_MOST_SMALL = 127  # of a table's whole numbers
_MOST_BITS = 8
_CONSTANT = 2.0**-24  # of a constant, its step: no code moves it by more than its rounding does


class NotPackable(ValueError):
    """The numbers of a family are none that the library multiplies."""


def pack_family(family: Family) -> PackedWeight:
    """A weight as the library reads it. Raises NotPackable saying why it cannot be."""
    return PACKERS[family.family_name](family)


def pack_affine(family: Affine) -> PackedWeight:
    """Integers under scales and zeros."""
    bits = _bits(family.bits, family.codes)
    scale, zero = _scale_and_zero(family)
    if isinstance(family.grouping, Grouping) and family.grouping.strided:
        return _pack_strided(family, family.grouping, scale, zero, bits)
    place, columns = _by_columns(family)
    constant = float(zero[0]) if zero.numel() and bool((zero == zero[0]).all()) else None
    zeros = None if constant is not None else by_blocks(_narrow(zero, whole=True)[place], columns.groups)
    factors = Factors(by_blocks(_narrow(scale)[place], columns.groups), zeros, constant or 0.0)
    return _packed(family.codes, bits, columns, Element(), factors)


def pack_lookup(family: Lookup) -> PackedWeight:
    """Codes of a table of levels under scales."""
    bits = _bits(math.log2(max(2, family.levels.numel())), family.codes)
    levels = torch.zeros(1 << bits, dtype=torch.float32)
    levels[: family.levels.numel()] = family.levels
    place, columns = _by_columns(family)
    factors = Factors(by_blocks(_narrow(family.scales())[place], columns.groups))
    return _packed(family.codes, bits, columns, _table(levels), factors)


def pack_scaled_float(family: ScaledFloat) -> PackedWeight:
    """Codes of small floats under scales. Those that a table in registers holds, or that are not finite, as a table."""
    element = minifloat.minifloat(family.element)
    table = family.as_lookup()
    is_finite = bool(torch.isfinite(table.levels)[family.codes.int()].all())
    if element.bits <= 4 or not element.is_signed or not is_finite:
        return pack_lookup(table)
    kind = Element(FLOAT, exponent=element.exponent_bits, mantissa=element.mantissa_bits, bias=element.bias)
    place, columns = _by_columns(family)
    factors = Factors(by_blocks(_narrow(family.scales())[place], columns.groups))
    return _packed(family.codes, element.bits, columns, kind, factors)


PACKERS: dict[str, Callable[[Any], PackedWeight]] = {
    "affine": pack_affine,
    "lookup": pack_lookup,
    "scaled_float": pack_scaled_float,
}


def _packed(codes: Tensor, bits: int, columns: Columns, element: Element, factors: Factors) -> PackedWeight:
    shape = (codes.shape[0], codes.shape[1])
    rows = plain_rows(shape[0])
    return PackedWeight(shape, bits, pack_codes(codes, bits, rows, columns), rows, columns, element, factors)


def _pack_strided(family: Affine, grouping: Grouping, scale: Tensor, zero: Tensor, bits: int) -> PackedWeight:
    """Groups across rows: the rows of one remainder share a scale and a zero for each column."""
    (rows, columns), count = family.shape, grouping.count(family.codes.numel())
    if columns % count == 0:
        scale, zero, count = (scale.repeat(columns // count), zero.repeat(columns // count), columns)
    if count % columns or rows % (count // columns):
        raise NotPackable(f"{grouping} of a weight {[rows, columns]} share no scales of whole columns")
    order, layout = rows_by_residue(rows, count // columns), group_columns(torch.zeros(columns, dtype=torch.int32), 1)
    padding = (0, layout.padded - columns)
    of_columns = [torch.nn.functional.pad(part.float().view(-1, columns), padding) for part in (scale, zero)]
    factors = Factors(column_scale=of_columns[0], column_zero=of_columns[1])
    codes = pack_codes(family.codes, bits, order, layout)
    return PackedWeight((rows, columns), bits, codes, order, layout, Element(), factors)


def _scale_and_zero(family: Affine) -> tuple[Tensor, Tensor]:
    """scale and zero [G]; of an offset the zero that says the same, also where the scale is 0."""
    scale = family.scales()
    if family.offset is None:
        return scale, cast(Tensor, family.zero)
    scale, offset = scale.float(), family.offsets().float()
    scale = torch.where((scale == 0) & (offset != 0), offset.abs() * _CONSTANT, scale)
    return scale, torch.where(scale == 0, 0.0, -offset / scale)


def _by_columns(family: Affine | Lookup | ScaledFloat) -> tuple[Tensor, Columns]:
    """Which factor each row uses for each group of packed columns [N, G], and the layout of columns."""
    try:
        place, index = family.grouping.by_columns(family.shape, torch.device("cpu"))
    except ValueError as error:
        raise NotPackable(str(error)) from error
    return place, group_columns(index, place.shape[1])


def _bits(bits: float, codes: Tensor) -> int:
    whole = math.ceil(bits)
    if not 1 <= whole <= _MOST_BITS or codes.dtype != torch.uint8:
        raise NotPackable(f"codes of {bits} bits in {codes.dtype} are none of 1 to {_MOST_BITS} bits in uint8")
    if codes.numel() and int(codes.max()) >> whole:
        raise NotPackable(f"a code {int(codes.max())} has more than {whole} bits")
    return whole


def _narrow(factors: Tensor, whole: bool = False) -> Tensor:
    """Factors in the narrowest dtype that holds them exactly; whole: perhaps in bytes."""
    if whole and bool(((factors >= 0) & (factors <= 255) & (factors == factors.round())).all()):
        return factors.to(torch.uint8)
    if factors.dtype in (torch.float16, torch.bfloat16):
        return factors
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(factors.to(dtype).to(factors.dtype), factors):
            return factors.to(dtype)
    return factors.float()


def _table(levels: Tensor) -> Element:
    """A table; one of 16 levels that are small whole numbers of a unit says so, and is multiplied in integers."""
    sizes = levels.abs()
    unit = float(sizes[sizes > 0].min()) if bool((sizes > 0).any()) else 1.0
    steps = levels / unit
    low, high = float(steps.min()), float(steps.max())
    if levels.numel() != 16 or high - low > _MOST_SMALL or not torch.equal(steps, steps.round()):
        return Element(TABLE, levels)
    return Element(TABLE, levels, (steps - low).to(torch.uint8), small_zero=-low, small_unit=unit)
