"""Blocks as the families of the core, and families as blocks: for kernels that serve a family, and for conversions."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.sdk import Affine, Family, Grouping, Lookup, NestedScale, ScaledFloat
from quantcore_misc.gguf.blocks import SCALED, Scaled, codes_of, level_table
from quantcore_misc.gguf.layouts import join_fields, pack, split_fields
from quantcore_misc.gguf.types import BLOCK_TYPES

_ELEMENT = "e2m1"
_SIGNED = 128  # what makes signed bytes codes from 0


def family_of(name: str) -> str | None:
    """The family of a type: of small floats, of levels, of integers; None for vectors and digits."""
    layout = SCALED.get(name)
    if layout is None:
        return None
    if layout.scales.table is not None:
        return "scaled_float"
    return "lookup" if layout.levels else "affine"


def lower(rows: Tensor, name: str, shape: tuple[int, ...]) -> Family:
    """The numbers in rows of blocks [N, bytes of a row], of a type that has a family; shape: of the weight.

    Raises ValueError for a scale of MXFP4 that is NaN in the family, and so no number of it.
    """
    kind, layout = BLOCK_TYPES[name], SCALED[name]
    parts = split_fields(rows.reshape(-1, kind.nbytes), kind)
    codes = codes_of(parts, layout)
    codes = (codes.to(torch.int16) + _SIGNED).to(torch.uint8) if not layout.planes else codes
    codes, grouping = codes.reshape(shape), Grouping(layout.group)
    if layout.scales.table is not None:
        scale = 2 * layout.scales.factors(parts)[0].reshape(-1)
        if not bool(scale.isfinite().all()):
            raise ValueError(f"a block of {name} has the scale 255, which other formats read as NaN")
        return ScaledFloat(codes, _ELEMENT, scale, grouping)
    integers, minima = layout.scales.integers(parts)
    groups = Grouping(kind.elements // layout.group)
    factor = _nested(integers, parts["d"].float().reshape(-1), groups)
    if layout.levels:
        return Lookup(codes, level_table(layout.levels, codes.device), factor, grouping, layout.bits)
    if layout.scales.has_offset:
        return Affine(codes, factor, None, grouping, layout.bits, parts["m"].float().reshape(-1))
    if minima is not None:
        offset = _nested(minima, -parts["dmin"].float().reshape(-1), groups)
        return Affine(codes, factor, None, grouping, layout.bits, offset)
    count = codes.numel() // layout.group
    zero = torch.full((count,), float(_zero(layout)), device=codes.device)
    return Affine(codes, factor, zero, grouping, layout.bits)


def raised(family: Family, name: str) -> Tensor:
    """Rows of blocks of a type that hold the numbers of a family. Raises ValueError where they cannot exactly."""
    kind, layout = BLOCK_TYPES[name], SCALED.get(name)
    if layout is None or family.family_name != family_of(name) or family.bits > layout.bits:
        raise ValueError(f"{type(family).__name__} of {family.bits} bits does not fit {name}")
    assert isinstance(family, Affine | Lookup | ScaledFloat)
    blocks = family.codes.numel() // kind.elements
    if isinstance(family, ScaledFloat):
        fields = _raised_floats(family, layout, blocks)
    elif isinstance(family, Lookup):
        _check(
            torch.equal(family.levels.float(), level_table(layout.levels, family.codes.device)), name, "other levels"
        )
        fields = _raised_scales(family, layout, blocks, name)
    else:
        fields = _raised_affine(family, layout, blocks, name)
    codes = family.codes.reshape(blocks, -1)
    signed = {} if layout.planes else {"qs": (codes.to(torch.int16) - _SIGNED).to(torch.int8)}
    packed = pack(codes, layout.planes) if layout.planes else signed
    return join_fields({**fields, **packed}, kind).view(family.shape[0], -1)


def _zero(layout: Scaled) -> int:
    return layout.zero if layout.planes else _SIGNED


def _nested(integers: Tensor | None, outer: Tensor, groups: Grouping) -> Tensor | NestedScale:
    if integers is None:
        return outer
    return NestedScale(integers.reshape(-1).contiguous(), None, outer.contiguous(), groups)


def _raised_affine(family: Affine, layout: Scaled, blocks: int, name: str) -> dict[str, Tensor]:
    has_minima = layout.scales.has_offset or (layout.scales.most > 0 and layout.zero == 0)
    if not has_minima:
        zeros = family.by_column_runs(layout.group)[1]
        _check(bool((zeros == _zero(layout)).all()), name, f"zero points other than {_zero(layout)}")
        return _raised_scales(family, layout, blocks, name)
    _check(family.grouping == Grouping(layout.group), name, f"no groups of {layout.group}")
    if layout.scales.has_offset:
        offset = _half(family.offsets(), name).view(blocks, -1)
        return {**_raised_scales(family, layout, blocks, name), "m": offset}
    (scale, d), (minimum, dmin) = (_integers(part, layout, blocks, name) for part in (family.scale, family.offset))
    written = layout.scales.write(scale.to(torch.uint8), minimum.to(torch.uint8))
    return {"d": _half(d, name)[:, None], "dmin": _half(-dmin, name)[:, None], **written}


def _raised_scales(family: Affine | Lookup, layout: Scaled, blocks: int, name: str) -> dict[str, Tensor]:
    if layout.scales.most:
        _check(family.grouping == Grouping(layout.group), name, f"no groups of {layout.group}")
        integers, d = _integers(family.scale, layout, blocks, name)
        return {"d": _half(d, name)[:, None], **layout.scales.write(integers.to(torch.int8), None)}
    if isinstance(family, Affine) and family.zero is not None:
        scale = family.by_column_runs(layout.group)[0].reshape(-1)
    else:
        _check(family.grouping == Grouping(layout.group), name, f"no groups of {layout.group}")
        scale = family.scales()
    return {"d": _half(scale, name).view(blocks, -1)}


def _integers(scale: Tensor | NestedScale | None, layout: Scaled, blocks: int, name: str) -> tuple[Tensor, Tensor]:
    """Integers of groups [n, groups], and what multiplies them in each block [n]."""
    is_nested = isinstance(scale, NestedScale) and scale.levels is None and scale.offset is None
    _check(is_nested, name, "scales that are no integers times one of a block")
    assert isinstance(scale, NestedScale)
    _check(scale.outer.numel() == blocks, name, "other blocks of scales")
    fits = bool((scale.codes.int().abs() <= layout.scales.most).all())
    _check(fits, name, f"scales beyond {layout.scales.most}")
    return scale.codes.view(blocks, -1), scale.outer


def _raised_floats(family: ScaledFloat, layout: Scaled, blocks: int) -> dict[str, Tensor]:
    """The bytes of scales, found in the table of their values."""
    assert layout.scales.table is not None, "small floats have a table"
    _check(family.element == _ELEMENT, "a block", f"elements {family.element}")
    _check(family.grouping == Grouping(layout.group), "a block", f"no groups of {layout.group}")
    every = 2 * layout.scales.table(family.codes.device)
    table = every[: 1 + int((every[1:] > every[:-1]).cumprod(0).sum())]  # as far as it rises
    scale = family.scales().float()
    codes = torch.searchsorted(table, scale).clamp_(max=len(table) - 1)
    _check(torch.equal(table[codes], scale), "a block", "scales that it has no byte for")
    return {"scales": codes.to(torch.uint8).view(blocks, -1)}


def _half(values: Tensor, name: str) -> Tensor:
    found = values.to(torch.float16)
    _check(torch.equal(found.to(values.dtype), values), name, f"scales of {values.dtype}, which float16 does not hold")
    return found


def _check(holds: bool, name: str, found: str) -> None:
    if not holds:
        raise ValueError(f"{name} cannot hold these numbers exactly: the weight has {found}")
