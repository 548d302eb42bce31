"""Outer scales by which one format multiplies, and another divides: float32 numbers that stand for each other."""

from __future__ import annotations

import torch
from torch import Tensor

from quantcore.formats.families import Family, NestedScale, ScaledFloat
from quantcore.formats.quantized_weight import QuantizedWeight

_FEW_ULPS = 2.0**-21  # of an inverse, a product instead of a quotient, and one more product, each rounded


def inverse(outer: Tensor) -> Tensor:
    """The float32 numbers nearest to 1 / outer. Raises ValueError where one is no finite number other than 0."""
    found = outer.float().reciprocal()
    if not bool((found.isfinite() & (found != 0)).all()):
        raise ValueError(f"the outer scale {outer.flatten()[0].item():.9g} has no inverse in float32")
    return found


def is_inverse(first: Tensor, second: Tensor) -> bool:
    """Whether each of two tensors of float32 is what `inverse` makes of the other."""
    return torch.equal(inverse(first), second.float()) and torch.equal(inverse(second), first.float())


def inverted_difference(lowered: Family, old: QuantizedWeight, new: QuantizedWeight) -> str | None:
    """What the outer scale of a weight lost when it was inverted for another format, "" for nothing.

    lowered: the family of old. None: the weights differ by more than that, or both multiply by it, or divide.
    """
    one = _nested(lowered)
    family = new.lower() if one is not None else lowered
    other = _nested(family)
    if one is None or other is None or one.divides == other.divides or lowered.shape != family.shape:
        return None
    assert isinstance(lowered, ScaledFloat)
    assert isinstance(family, ScaledFloat)
    is_kept = lowered.element == family.element and torch.equal(lowered.codes, family.codes)
    first, second = old.dequantize(torch.float32), new.dequantize(torch.float32)
    least = torch.finfo(torch.float32).tiny
    if not is_kept or not torch.allclose(first, second, rtol=_FEW_ULPS, atol=least, equal_nan=True):
        return None
    if not bool(first.any()) or is_inverse(one.outer, other.outer):
        return ""
    return (
        f"codes and block scales are the same, but the outer scale {one.outer.item():.9g} has no exact inverse in "
        f"float32: {other.outer.item():.9g} stands for one that differs by one ulp"
    )


def _nested(family: Family) -> NestedScale | None:
    """The scale of small floats under one other."""
    scale = family.scale if isinstance(family, ScaledFloat) else None
    return scale if isinstance(scale, NestedScale) and scale.outer.numel() == 1 else None
