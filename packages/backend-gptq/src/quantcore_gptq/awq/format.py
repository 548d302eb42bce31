"""How one AWQ weight is stored: integers with a scale and a zero point a group of input columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Affine, Family, TensorSpec, WeightFormat, column_grouping, dtype_name, float_dtype
from quantcore_gptq.awq.grid import Grid, encode, ranges
from quantcore_gptq.awq.versions import VERSIONS, Facts, Parts, Version
from quantcore_gptq.marlin import Marlin


@dataclass(frozen=True)
class Awq(WeightFormat):
    """w = (code - zero) * scale in scale_dtype, for groups of group_size columns of a row; -1: the row is one group.

    version: the layout, one of VERSIONS. zero_point: whether `quantize` chooses zero points, else all are 2**(bits-1).
    interleaved: whether columns are reordered within 8 before they are packed, as every writer does for 4 bits.
    """

    family: ClassVar[str | None] = "affine"

    version: str = "gemm"
    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    scale_dtype: str = "float16"
    interleaved: bool = True

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        self.check_shape(shape)
        return self._version.specs(shape[0], shape[1], self._facts(shape))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        K = shape[1]
        group, version = self._group(shape), self._version
        if self.bits not in version.widths:
            raise ValueError(f"version {self.version} stores {_list(version.widths)} bits, not {self.bits}; use gemm")
        if group < 1 or K % group:
            usable = [size for size in (128, 64, 32, 16) if K % size == 0]
            raise ValueError(f"in_features {K} is not a multiple of group_size {group}; use {_list([*usable, -1])}")
        if version.groups is not None and group < 128 and group not in version.groups:
            raise ValueError(
                f"version {self.version} stores groups of {_list(version.groups)}, or of 128 and more, not {group}; "
                "use gemm"
            )
        for name, size, multiple in zip(
            ("out_features", "in_features"), shape, version.multiples(self.bits), strict=True
        ):
            if size % multiple or not size:
                raise ValueError(
                    f"{name} {size} is not a multiple of {multiple}, as version {self.version} with {self.bits} bits "
                    "needs; leave this layer float by modules_to_not_convert"
                )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self.store(_round(weight, self._dtype, self.grid(weight.shape)))

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors of a float32 weight [N, K], of which only the scales are rounded to scale_dtype."""
        return self.store(_round(weight, torch.float32, self.grid(weight.shape), self._dtype))

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of codes uint8 [N, K] with scale and zero [N, G], whole numbers in 0..2**bits - 1."""
        dtype = self._dtype
        rounded = Parts(parts.codes, parts.scale.to(dtype), parts.zero.to(dtype))
        return self._version.store(rounded, self._facts(tuple(parts.codes.shape)))

    def load(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        """The inverse of `store`."""
        return self._version.load(tensors, (shape[0], shape[1]), self._facts(shape))

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes, scale, zero = self.load(tensors, shape)
        values = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
        values = values.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
        values = torch.flatten(values, 1)
        return values if dtype is None else values.to(dtype)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The same format with scales in the dtype in which they are stored."""
        scales = tensors.get("scales")
        if scales is None or not scales.is_floating_point():
            return self
        return replace(self, scale_dtype=dtype_name(scales.dtype))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        qweight = tensors.get("qweight")
        return None if qweight is None or qweight.ndim != 2 else self._version.shape(tensors, self.bits)

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        codes, scale, zero = self.load(tensors, shape)
        grouping = column_grouping(shape[1], self._group(shape))
        return Affine(codes.contiguous(), scale.reshape(-1), zero.reshape(-1), grouping, self.bits)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        if not isinstance(family, Affine) or family.bits > self.bits:
            raise ValueError(f"{type(family).__name__} of {family.bits} bits does not fit {self!r}")
        shape = tuple(family.shape)
        self.check_shape(shape)
        if family.dtype != self._dtype:
            raise ValueError(
                f"scale is {dtype_name(family.dtype)}, scale_dtype {self.scale_dtype}; the product would round "
                "differently"
            )
        scale, zero = family.by_column_runs(self._group(shape))
        if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**self.bits)).all()):
            raise ValueError(f"zero points are not whole numbers in [0, {2**self.bits - 1}], which is all awq stores")
        return self.store(Parts(family.codes, scale, zero))

    @property
    def _version(self) -> Version:
        return VERSIONS[self.version]

    @property
    def _dtype(self) -> torch.dtype:
        return float_dtype(self.scale_dtype, "scale_dtype")

    def _group(self, shape: tuple[int, ...]) -> int:
        return shape[1] if self.group_size == -1 else self.group_size

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """What `quantize` rounds a weight of this shape to."""
        return Grid(self.bits, self._group(shape), self.zero_point)

    def _facts(self, shape: tuple[int, ...]) -> Facts:
        return Facts(self.bits, self._group(shape), self._dtype, self.interleaved, self.group_size == -1)


@dataclass(frozen=True)
class AwqMarlin(Marlin):
    """The layout of the Marlin kernel under AutoAWQ's names: 4 bits, every zero point 8."""

    codes: str = "qweight"
    scales: str = "scales"

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return self._store(_round(weight, self._dtype, self.grid(weight.shape)))

    def fit(self, weight: Tensor) -> dict[str, Tensor]:
        """As `Awq.fit`."""
        return self._store(_round(weight, torch.float32, self.grid(weight.shape), self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return float_dtype(self.scale_dtype, "scale_dtype")

    def grid(self, shape: tuple[int, ...]) -> Grid:
        """What `quantize` rounds a weight of this shape to."""
        return Grid(4, shape[1] if self.group_size == -1 else self.group_size, zero_point=False)

    def _store(self, parts: Parts) -> dict[str, Tensor]:
        codes, scale, zero = parts
        grouping = column_grouping(codes.shape[1], codes.shape[1] // scale.shape[1])
        return self.raise_(Affine(codes, scale.reshape(-1), zero.reshape(-1), grouping, 4))


def _round(weight: Tensor, dtype: torch.dtype, grid: Grid, scale_dtype: torch.dtype | None = None) -> Parts:
    """A weight [N, K] on its grid, computed in dtype, with scales rounded to scale_dtype before codes are chosen."""
    scale_dtype = scale_dtype or dtype
    low, high = torch.aminmax(weight.detach())
    if max(-low, high) > torch.finfo(scale_dtype).max:
        raise ValueError(f"the weight holds values beyond {dtype_name(scale_dtype)}, in which its scales are stored")
    groups = weight.detach().to(dtype).reshape(weight.shape[0], -1, grid.group)
    scale, zero = ranges(groups, grid.bits, grid.zero_point)
    scale = scale.to(scale_dtype)
    codes = encode(groups, scale.to(dtype), zero, grid.bits).to(torch.uint8).view(weight.shape)
    return Parts(codes, scale.squeeze(-1), zero.squeeze(-1).to(scale_dtype))


def _list(values: object) -> str:
    return ", ".join(map(str, values))  # type: ignore[call-overload]
