"""Integer codes under float scales as the affine family, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.formats.families import Affine, ColumnGroups, Family, Grouping, column_grouping

if TYPE_CHECKING:
    from quantcore_misc.compressed_tensors.weight import CompressedWeight


def lower_integers(
    weight_format: CompressedWeight, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: Tensor | None = None
) -> Affine:
    """The stored codes, shifted to 0 and above, with their scales and zeros in the order of the family.

    index: [K], the group of each column, where columns are not grouped in runs.
    """
    scaling = weight_format.scaling
    assert scaling is not None
    scale, zero = weight_format.read_scales(tensors, shape)
    offset = 1 << (scaling.bits - 1)
    codes = weight_format.unpack(tensors, shape).view(torch.uint8) + offset
    zeros = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
    if scaling.rows > 1:  # blocks of several rows: each row gets the scales of its block
        rows = torch.arange(shape[0], device=scale.device) // scaling.rows
        scale, zeros = scale.index_select(0, rows), zeros.index_select(0, rows)
    return Affine(
        codes, scale.reshape(-1), (zeros + offset).reshape(-1), _grouping(weight_format, shape, index), scaling.bits
    )


def raise_integers(weight_format: CompressedWeight, family: Family, *, has_index: bool = False) -> dict[str, Tensor]:
    """The tensors that hold the numbers of a family. Raises ValueError where the format cannot hold them exactly.

    has_index: the format stores the group of each column, so that groups need be no runs.
    """
    scaling, shape = weight_format.scaling, tuple(family.codes.shape)
    assert scaling is not None
    if not isinstance(family, Affine) or family.bits > scaling.bits:
        raise ValueError(f"{type(family).__name__} of {family.bits} bits does not fit {weight_format!r}")
    if family.scale.dtype != weight_format.torch_dtype:
        raise ValueError(
            f"scale is {family.scale.dtype}, dtype {weight_format.dtype}; the product would round otherwise"
        )
    scale, zeros = family.by_columns()[:2] if has_index else _on_grid(weight_format, family, shape)
    if tuple(scale.shape) != scaling.grid(shape):
        raise ValueError(
            f"scales {list(scale.shape)} do not fit the groups {list(scaling.grid(shape))} of {weight_format!r}"
        )
    offset = 1 << (scaling.bits - 1)
    zero = (zeros - offset).to(torch.int8)
    if not weight_format.has_zero and bool(zero.any()):
        raise ValueError("the weight is asymmetric, but this format stores no zero points; use symmetric: false")
    stored = weight_format.store_scales(scale, zero, shape)
    read = weight_format.read_scales(stored, shape)[1] if weight_format.has_zero else zero
    if not torch.equal(read.to(zeros.dtype) + offset, zeros):  # type: ignore[union-attr]
        raise ValueError(
            f"the zeros are no integers of {scaling.bits} bits, which is what {type(weight_format).__name__} stores"
        )
    codes = (family.codes - offset).view(torch.int8)
    return {**weight_format.pack(codes), **stored}


def _grouping(weight_format: CompressedWeight, shape: tuple[int, ...], index: Tensor | None) -> Grouping | ColumnGroups:
    scaling = weight_format.scaling
    assert scaling is not None
    if scaling.rows == 0 and scaling.columns == 0:
        return Grouping(shape[0] * shape[1])
    return column_grouping(shape[1], scaling.block(shape)[1], index)


def _on_grid(weight_format: CompressedWeight, family: Affine, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero of a family, [grid] of the format."""
    scaling = weight_format.scaling
    assert scaling is not None
    if scaling.rows == 0 and family.grouping == Grouping(shape[0] * shape[1]):
        return family.scale.view(1, 1), family.zero.view(1, 1)
    scale, zero = family.by_column_runs(scaling.block(shape)[1])
    height = scaling.block(shape)[0]
    if height == 1:
        return scale, zero
    rows = torch.arange(shape[0], device=scale.device) // height * height
    if not (torch.equal(scale[rows], scale) and torch.equal(zero[rows], zero)):
        raise ValueError(f"rows of one block of {height} have different scales")
    return scale[::height], zero[::height]
