"""What is stored of a layer's activations, as another format of the same layer stores it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import WeightFormat
from quantcore.formats.inverses import inverse, is_inverse
from quantcore.formats.rounded import SIDES, RoundedLayer

_ALIKE = ("element", "strategy", "group_size", "is_static", "is_symmetric")


def carried_rounding(
    old: WeightFormat, tensors: Mapping[str, Tensor], new: WeightFormat
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of activations that a format stores, from those of another, and which are off by one ulp.

    An outer scale is inverted where one format multiplies by it and the other divides. Raises ValueError for what the
    old format does not store, or the new one cannot hold exactly.
    """
    found: dict[str, Tensor] = {}
    inexact: list[str] = []
    for side in SIDES if isinstance(new, RoundedLayer) else ():
        assert isinstance(new, RoundedLayer)
        wanted, rounding = new.side_specs(side), new.activation(side)
        if not wanted:
            continue
        known = old.activation(side) if isinstance(old, RoundedLayer) else None
        if known is None or rounding is None or not _is_alike(known, rounding):
            raise ValueError(
                f"{', '.join(spec.name for spec in wanted.values())}: measured with data, which the checkpoint does "
                f"not store for this rounding of the {side}; choose a format that rounds weights alone"
            )
        assert isinstance(old, RoundedLayer)
        stored = old.side_specs(side)
        for role, spec in wanted.items():
            tensor = tensors[stored[role].name] if role in stored else torch.zeros(spec.shape)  # symmetric: zeros of 0
            if role == "outer" and known.outer != rounding.outer:
                tensor, original = inverse(tensor), tensor
                inexact += [] if is_inverse(original, tensor) else [spec.name]
            kept = tensor.to(spec.dtype)
            if not torch.equal(kept.to(torch.float64), tensor.to(torch.float64)):
                raise ValueError(f"{spec.name}: {tensor.dtype} of the checkpoint does not fit {spec.dtype}")
            found[spec.name] = kept.reshape(spec.shape)
    return found, inexact


def _is_alike(one: Activation, other: Activation) -> bool:
    """Whether what is stored for one rounding serves the other."""
    alike = all(getattr(one, name) == getattr(other, name) for name in _ALIKE)
    return alike and (one.outer is None) == (other.outer is None)
