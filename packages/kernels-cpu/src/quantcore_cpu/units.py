"""The layout in which prepared layers hold their weights: the packed units in place of the stored codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.sdk import Layout, WeightFormat
from quantcore_cpu.families import NotPackable, pack_family
from quantcore_cpu.layout import COLUMNS, ROWS, Columns, Rows
from quantcore_cpu.library import why_missing
from quantcore_cpu.packed import Element, Factors, NativeWeight, PackedWeight, native_weight, unpack_codes

Shape = tuple[int, ...]
# What a packed weight consists of besides its codes; absent ones are empty.
_PARTS = ("scale", "zero", "column_scale", "column_zero", "order", "row_of", "class_of", "levels", "small")
_INTEGERS = ("bits", "padded", "group", "blocks", "kind", "exponent", "mantissa", "bias")
_FLOATS = ("zero_of_all", "small_zero", "small_unit")
NAMES = ("units", *_PARTS, "numbers")


@dataclass(frozen=True, repr=False)
class Units(Layout):
    """Packed units for `cpu_native`. The operand that holds the codes is replaced; the others, small, stay beside.

    A weight that cannot be packed so, or whose format does not store the same codes again bit for bit, stays as it is.
    """

    def packed_names(self, weight_format: WeightFormat, shape: Shape) -> tuple[str, ...]:
        return (*NAMES, *(f"kept.{name}" for name in self.replaces(weight_format, shape)))

    def pack(self, operands: Mapping[str, Tensor], weight_format: WeightFormat, shape: Shape) -> dict[str, Tensor]:
        kept = {f"kept.{name}": tensor.clone() for name, tensor in operands.items()}
        holder = _holder_of_codes(operands)
        try:
            family: Any = weight_format.lower_operands(operands, shape)
            packed = pack_family(family)
            again = _with_codes(operands, holder, family.codes, weight_format, shape)
        except (NotPackable, ValueError):
            return {**_nothing(), **kept}
        if not torch.equal(_bytes(again), _bytes(operands[holder])):
            return {**_nothing(), **kept}
        return {**_tensors(packed), **kept, f"kept.{holder}": _emptied(operands[holder])}

    def unpack(self, packed: Mapping[str, Tensor], weight_format: WeightFormat, shape: Shape) -> dict[str, Tensor]:
        kept = {name: packed[f"kept.{name}"] for name in self.replaces(weight_format, shape)}
        if not is_packed(packed):
            return kept
        holder = next(name for name, tensor in kept.items() if tensor.ndim > 1 and tensor.shape[0] == 0)
        sized = {**kept, holder: kept[holder].new_empty(kept[holder].shape[1:])}
        return {**kept, holder: _with_codes(sized, holder, _unpack_codes(packed, shape), weight_format, shape)}


def is_packed(packed: Mapping[str, Tensor]) -> bool:
    """Whether a layer's weight is held in units, and not as it was stored."""
    return packed["units"].numel() > 0


def weight_of(packed: Mapping[str, Tensor], shape: tuple[int, int]) -> NativeWeight:
    """The weight that packed tensors on a CPU hold; it lives no longer than they."""
    integers, floats = _numbers(packed["numbers"])
    part: dict[str, Tensor | None] = {name: packed[name] if packed[name].numel() else None for name in _PARTS}
    return native_weight(
        shape,
        integers["bits"],
        packed["units"],
        Rows(integers["blocks"], part["row_of"], part["class_of"]),
        Columns(integers["padded"], integers["group"], part["order"]),
        Element(
            integers["kind"],
            part["levels"],
            part["small"],
            floats["small_zero"],
            floats["small_unit"],
            integers["exponent"],
            integers["mantissa"],
            integers["bias"],
        ),
        Factors(part["scale"], part["zero"], floats["zero_of_all"], part["column_scale"], part["column_zero"]),
    )


def _holder_of_codes(operands: Mapping[str, Tensor]) -> str:
    """The operand that holds the codes: the largest."""
    return max(operands, key=lambda name: operands[name].nbytes)


def _emptied(tensor: Tensor) -> Tensor:
    """A tensor without elements that tells dtype and shape of another."""
    return tensor.new_empty((0, *tensor.shape))


def _with_codes(
    operands: Mapping[str, Tensor], holder: str, codes: Tensor, weight_format: WeightFormat, shape: Shape
) -> Tensor:
    """The operand that holds these codes, made without reading it: of one that holds scales too they are lost."""
    blank = {**operands, holder: torch.zeros_like(operands[holder])}
    family: Any = weight_format.lower_operands(blank, shape)
    return weight_format.raise_(dataclasses.replace(family, codes=codes))[holder]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _nothing() -> dict[str, Tensor]:
    return {name: torch.empty(0, dtype=torch.uint8) for name in NAMES}


def _tensors(packed: PackedWeight) -> dict[str, Tensor]:
    factors, element, columns, rows = packed.factors, packed.element, packed.columns, packed.rows
    found = {
        **vars(factors),
        **vars(element),
        "order": columns.order,
        **vars(rows),
        **vars(columns),
        "bits": packed.bits,
    }
    numbers = [float(found[name]) for name in (*_INTEGERS, *_FLOATS)]
    parts = {name: found[name] if isinstance(found[name], Tensor) else torch.empty(0) for name in _PARTS}
    return {"units": packed.codes, **parts, "numbers": torch.tensor(numbers, dtype=torch.float64)}


def _numbers(stored: Tensor) -> tuple[dict[str, int], dict[str, float]]:
    values = stored.tolist()
    integers = {name: int(value) for name, value in zip(_INTEGERS, values, strict=False)}
    return integers, dict(zip(_FLOATS, values[len(_INTEGERS) :], strict=True))


def _unpack_codes(packed: Mapping[str, Tensor], shape: Shape) -> Tensor:
    """The codes [N, K], on any device."""
    integers, _ = _numbers(packed["numbers"])
    if packed["units"].device.type != "cpu" or why_missing() is not None:
        return _unpack_in_torch(packed, integers, shape)
    part = {name: packed[name] if packed[name].numel() else None for name in ("order", "row_of")}
    rows = Rows(integers["blocks"], part["row_of"])
    columns = Columns(integers["padded"], integers["group"], part["order"])
    return unpack_codes(packed["units"], shape, integers["bits"], rows, columns)


def _unpack_in_torch(packed: Mapping[str, Tensor], integers: Mapping[str, int], shape: Shape) -> Tensor:
    units = packed["units"].view(integers["blocks"], integers["padded"] // COLUMNS, -1)
    steps = _steps(units, integers["bits"])  # [blocks, units, 8, 16, 4]
    lying = steps.permute(0, 3, 1, 2, 4).reshape(integers["blocks"] * ROWS, integers["padded"])
    codes = lying.new_empty(shape)
    order, row_of = packed["order"], packed["row_of"]
    if order.numel():
        held = order >= 0
        columns = lying.new_empty(lying.shape[0], shape[1])
        columns[:, order[held].long()] = lying[:, held]
    else:
        columns = lying[:, : shape[1]]
    if not row_of.numel():
        return columns[: shape[0]].contiguous()
    held = row_of >= 0
    codes[row_of[held].long()] = columns[held]
    return codes


def _steps(units: Tensor, bits: int) -> Tensor:
    """Codes of units [..., 64 * bits] as [..., 8, 16, 4]: 4 columns of 16 rows each. See native/quantcore_cpu.h."""
    blocks, count = units.shape[:2]
    if bits == 8:
        return units.view(blocks, count, 8, ROWS, 4)
    total, at, shift = units.new_zeros(blocks, count, 8, ROWS, 4), 0, 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        plane = units[..., at : at + 64 * width].reshape(blocks, count, width, 1, ROWS, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=units.device).view(-1, 1, 1)
        codes = ((plane >> shifts) & ((1 << width) - 1)).reshape(blocks, count, 8, ROWS, 4)
        total, at, shift = total | (codes << shift), at + 64 * width, shift + width
    return total
