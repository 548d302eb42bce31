"""The canonical numeric forms that formats lower to, so that kernels and conversions are written once a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Which scale each weight uses, by its index i in the flattened row-major weight.

    Contiguous: group i // size, the last group may be short. Strided: group i % count, where count = numel / size.
    """

    size: int
    strided: bool = False

    def count(self, numel: int) -> int:
        """Number of groups of a weight with numel elements."""
        return numel // self.size if self.strided else -(-numel // self.size)

    def scale(self, values: Tensor, factors: Tensor) -> Tensor:
        """values [numel] times each element's factor [G]; one rounding in values' dtype."""
        if self.strided:
            return (values.view(self.size, -1) * factors).view(-1)
        whole = values.numel() // self.size * self.size
        head = values[:whole].view(-1, self.size) * factors[: whole // self.size, None]
        return torch.cat([head.view(-1), values[whole:] * factors[whole // self.size :]])

    def shift(self, values: Tensor, offsets: Tensor) -> Tensor:
        """values [numel] minus each element's offset [G]; one rounding in values' dtype."""
        if self.strided:
            return (values.view(self.size, -1) - offsets).view(-1)
        whole = values.numel() // self.size * self.size
        head = values[:whole].view(-1, self.size) - offsets[: whole // self.size, None]
        return torch.cat([head.view(-1), values[whole:] - offsets[whole // self.size :]])


@dataclass(frozen=True)
class Affine:
    """w = (code - zero) * scale, computed in the dtype of scale.

    codes: [N, K] uint8. scale, zero: [G] float, zero in code units.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grouping: Grouping
    bits: float

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: the dtype of scale)."""
        values = self.grouping.shift(self.codes.reshape(-1).to(self.scale.dtype), self.zero)
        return self.grouping.scale(values, self.scale).view(self.codes.shape).to(dtype or self.scale.dtype)


@dataclass(frozen=True)
class NestedScale:
    """Block scales that are themselves stored as 8-bit codes: scale = levels[code] * outer[group] + offset.

    codes: [G] uint8. levels: [256] float32. outer: [ceil(G / grouping.size)] float32. offset: float32 scalar.
    """

    codes: Tensor
    levels: Tensor
    outer: Tensor
    grouping: Grouping
    offset: Tensor

    def dequantize(self) -> Tensor:
        """The block scales [G] float32, two roundings."""
        return self.grouping.scale(self.levels[self.codes.int()], self.outer) + self.offset


@dataclass(frozen=True)
class Lookup:
    """w = levels[code] * scale, computed in float32.

    codes: [N, K] uint8. levels: [L] float32. scale: [G] float32, or the nested form of it.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor | NestedScale
    grouping: Grouping
    bits: float

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] in dtype (None: float32), rounded once from float32."""
        scale = self.scale.dequantize() if isinstance(self.scale, NestedScale) else self.scale
        values = self.grouping.scale(self.levels[self.codes.reshape(-1).int()], scale)
        return values.view(self.codes.shape).to(dtype or torch.float32)


Family: TypeAlias = Affine | Lookup
