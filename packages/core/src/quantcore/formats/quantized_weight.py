"""One weight as it is stored, with the format that reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat

if TYPE_CHECKING:
    from quantcore.formats.families import Family


@dataclass(frozen=True)
class QuantizedWeight:
    """Stored tensors of one weight, under their checkpoint suffixes, with the format that reads them."""

    format: WeightFormat
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in dtype (None: the one that the format gives)."""
        return self.format.dequantize(self.format.operands(self.tensors, self.shape), self.shape, dtype)

    def lower(self) -> Family:
        """The same numbers in their canonical family. Raises ValueError for a weight that is stored transformed."""
        if self.format.transform is not None:
            raise ValueError(f"the stored numbers are those of a weight under {self.format.transform!r}")
        return self.format.lower(self.tensors, self.shape)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, measured from the tensors themselves."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))


def reading_faults(
    error: Exception, expected: WeightFormat, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> list[str]:
    """The faults of tensors whose description cannot be read: the error's own, and those by the format expected."""
    own = f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error)
    try:
        others = expected.faults(tensors, shape)
    except ValueError:  # the expected format cannot store this shape; what it would hold says nothing
        others = []
    return [*([] if any(fault.startswith(own) for fault in others) else [own]), *others]
