"""Scaled grids as the families of affine integers and of small floats, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.formats.elements import Float, Integer
from quantcore.formats.families import Affine, Family, NestedScale, ScaledFloat
from quantcore.formats.grouping import BlockGroups, Grouping, Groups, column_grouping
from quantcore.formats.inverses import inverse
from quantcore.formats.minifloat import levels

if TYPE_CHECKING:
    from quantcore.formats.scaled import Parts, Scaled


def family_of(weight_format: Scaled) -> str | None:
    """The family that holds the numbers of a format exactly, None where none does."""
    element, zero, outer = weight_format.element, weight_format.zero, weight_format.outer
    if isinstance(element, Float):
        is_nested = outer is None or (outer.steps == 1.0 and weight_format.scale.minifloat is not None)
        return "scaled_float" if zero is None and is_nested else None
    is_shifted = zero is not None and zero.in_values and element.low != 0  # codes from 0 would shift the offset
    return "affine" if outer is None and not is_shifted else None


def lower(weight_format: Scaled, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
    """The stored numbers in the family of `family_of`."""
    element, in_runs = weight_format.element, dataclasses.replace(weight_format, index=None)
    if isinstance(element, Float):
        return _small_floats(weight_format, tensors, shape, _scale(weight_format, tensors, shape))
    grouping = _grouping(weight_format, tensors, shape)
    factor, zero = in_runs.tables(tensors, shape)  # the family has the group of each column, too
    codes = (weight_format.unpack(tensors, shape).to(torch.int16) - element.low).to(torch.uint8)
    if weight_format.zero is not None and weight_format.zero.in_values and zero is not None:
        offset = -zero if weight_format.zero.is_subtracted else zero
        return Affine(codes, factor.reshape(-1), None, grouping, element.bits, offset.reshape(-1))
    zero = (torch.zeros_like(factor) if zero is None else zero) - element.low
    return Affine(codes, factor.reshape(-1), zero.reshape(-1), grouping, element.bits)


def small_floats(weight_format: Scaled, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> ScaledFloat:
    """The stored numbers of a format of small floats, each scale with that above all others in it."""
    factor, _ = dataclasses.replace(weight_format, index=None).tables(tensors, shape)
    return _small_floats(weight_format, tensors, shape, factor.reshape(-1))


def _small_floats(
    weight_format: Scaled, tensors: Mapping[str, Tensor], shape: tuple[int, ...], scale: Tensor | NestedScale
) -> ScaledFloat:
    element = weight_format.element
    assert isinstance(element, Float)
    codes = element.to_bits(weight_format.unpack(tensors, shape).contiguous())
    return ScaledFloat(codes, element.name, scale, _grouping(weight_format, tensors, shape))


def raised(weight_format: Scaled, family: Family) -> Parts:
    """The numbers of a family as those of a format. Raises ValueError where it cannot hold them exactly."""
    from quantcore.formats.scaled import Parts

    element, zero = weight_format.element, weight_format.zero
    if family.family_name != weight_format.family or family.bits > element.bits:
        raise ValueError(f"{type(family).__name__} of {family.bits} bits does not fit {weight_format!r}")
    if isinstance(family, ScaledFloat):
        return _raised_floats(weight_format, family)
    assert isinstance(family, Affine)
    assert isinstance(element, Integer)
    scale, grid = family.scales(), weight_format.grid(family.shape)
    codes = (family.codes.to(torch.int16) + element.low).to(element.dtype)
    stored = _stored_scale(weight_format, _on_grid(weight_format, family, scale))
    if zero is not None and zero.in_values:
        offset = _on_grid(weight_format, family, family.offsets())
        shift = (-offset if zero.is_subtracted else offset).to(zero.torch_dtype)
        if not torch.equal(shift.to(offset.dtype), -offset if zero.is_subtracted else offset):
            raise ValueError(f"the offsets are {offset.dtype}, which {zero.dtype} does not hold exactly")
        return Parts(codes, stored, shift)
    shifted = _on_grid(weight_format, family, family.zeros())
    numbers = (shifted + element.low).to(weight_format.zero_dtype)
    if zero is None and bool(numbers.any()):
        raise ValueError("the weight is asymmetric, but this format stores no zero points; use one that does")
    kept = numbers if zero is None else weight_format.load_zero(weight_format.store_zero(numbers), grid)
    if not torch.equal(kept.to(shifted.dtype) - element.low, shifted):
        raise ValueError(f"the zeros are no integers of {element.bits} bits, which is what {weight_format!r} stores")
    return Parts(codes, stored, numbers)


def _raised_floats(weight_format: Scaled, family: ScaledFloat) -> Parts:
    from quantcore.formats.scaled import Parts

    element = weight_format.element
    if not isinstance(element, Float) or family.element != element.name:
        raise ValueError(f"{family.element} is not the element of {weight_format!r}")
    codes, scale = element.from_bits(family.codes), family.scale
    if weight_format.outer is None:
        factor = _on_grid(weight_format, family, family.scales())
        # One product, rounded to the wider dtype and then to that of the numbers, is that rounded to the latter at
        # once: both significands together fit float32.
        is_wider = factor.dtype in (torch.bfloat16, torch.float16) and weight_format.own_dtype == torch.float32
        return Parts(codes, _stored_scale(weight_format, factor.float() if is_wider else factor))
    if not isinstance(scale, NestedScale) or scale.outer.numel() != 1 or scale.offset is not None:
        raise ValueError(f"{weight_format!r} stores scales under one other, which these numbers do not have")
    table = _levels(weight_format, scale.codes.device)
    if scale.levels is None or not torch.equal(scale.levels.nan_to_num(0.0), table.nan_to_num(0.0)):
        raise ValueError(f"the inner scales are no {weight_format.scale.kind_name}, as {weight_format!r} stores")
    stored = _on_grid(weight_format, family, scale.codes).view(weight_format.scale.torch_dtype)
    outer = scale.outer
    if scale.divides != weight_format.outer.divides:
        is_zero = not bool(outer.any()) and not bool(element.values(codes, torch.float32).any())
        outer = torch.ones_like(outer) if is_zero else inverse(outer)  # zeros are zeros under any scale
    return Parts(codes, stored, None, outer.reshape(()))


def _scale(weight_format: Scaled, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | NestedScale:
    if weight_format.outer is None:
        return dataclasses.replace(weight_format, index=None).tables(tensors, shape)[0].reshape(-1)
    stored = weight_format.scale.load(tensors[weight_format.scale.name], weight_format.grid(shape))
    codes, outer = stored.contiguous().view(torch.uint8).reshape(-1), tensors[weight_format.outer.name]
    return NestedScale(
        codes,
        _levels(weight_format, codes.device),
        outer.float().reshape(1),
        Grouping(max(1, codes.numel())),
        divides=weight_format.outer.divides,
    )


def _levels(weight_format: Scaled, device: torch.device) -> Tensor:
    """What the codes of scales stand for."""
    assert weight_format.scale.minifloat is not None
    return levels(weight_format.scale.minifloat).to(device)


def _stored_scale(weight_format: Scaled, factor: Tensor) -> Tensor:
    """Scales as the format stores them. Raises ValueError where products with these would be others."""
    stored = weight_format.scale.encode(factor)
    own = weight_format.factors(stored)
    if own.dtype != factor.dtype or not torch.equal(own, factor):
        raise ValueError(
            f"scales are {factor.dtype}, and those of the format {weight_format.scale.dtype}, with products in "
            f"{own.dtype}: these would be others"
        )
    return stored


def _grouping(weight_format: Scaled, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Groups:
    down, across = weight_format.sides(shape)
    if weight_format.block == (0, 0):
        return Grouping(max(1, shape[0] * shape[1]))
    if down > 1:
        return BlockGroups(down, across, shape[1])
    index = None if weight_format.index is None else weight_format.operands(tensors, shape)[weight_format.index]
    return column_grouping(shape[1], across, index, next(iter(tensors.values())).device)


def _on_grid(weight_format: Scaled, family: Affine | ScaledFloat, numbers: Tensor) -> Tensor:
    """The numbers [G] of a family's groups, [grid] of the format. Raises ValueError where its groups are others."""
    shape, grid = family.shape, weight_format.grid(family.shape)
    if weight_format.block == (0, 0) and family.grouping == Grouping(max(1, shape[0] * shape[1])):
        return numbers.view(1, 1)
    down, across = weight_format.sides(shape)
    place, index = family.grouping.by_columns(shape, family.codes.device)
    found = numbers[place]
    if weight_format.index is None:
        first = index[::across]
        if not torch.equal(first.repeat_interleave(across)[: index.numel()], index):
            raise ValueError(f"columns of one run of {across} belong to different groups: {family.grouping}")
        found = found.index_select(1, first)
    if down > 1:
        row = torch.arange(shape[0], device=found.device) // down * down
        if not torch.equal(found[row], found):
            raise ValueError(f"rows of one block of {down} have different scales")
        found = found[::down]
    if tuple(found.shape) != grid:
        raise ValueError(f"scales {list(found.shape)} do not fit the groups {list(grid)} of {weight_format!r}")
    return found
