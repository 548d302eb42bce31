"""How quanto stores one weight: bytes under scales of rows, or packed groups with a scale and a shift.

Source: optimum-quanto 0.2.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Codes,
    Float,
    Integer,
    Parts,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    Zero,
    blocks,
    dtype_name,
    float_dtype,
    row_chunks,
)

_SIDES = ("input_scale", "output_scale")  # stored in any case; 1 where nothing is rounded
_LARGEST_GROUP, _LEAST_GROUP = 128, 32
_TINY_GROUP = 128  # for which upstream holds bfloat16 weights of 4 bits with a zero point in place of the shift
_FLOATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2", "float8_e4m3fnuz": "e4m3fnuz"}


@dataclass(frozen=True, repr=False)
class QuantoScale(Scale):
    """Scales of groups in one column, those of a row one below the other."""

    def shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (grid[0] * grid[1], 1)


@dataclass(frozen=True, repr=False)
class QuantoShift(Zero):
    """Shifts as `QuantoScale` has scales."""

    def shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        return (grid[0] * grid[1], 1)


@dataclass(frozen=True)
class QuantoWeight(Scaled):
    """code * scale in the dtype of the scales. The scales of inputs and outputs are stored beside it, used or not."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        specs = super().tensor_specs(shape)
        named = {spec.name for spec in specs}
        dtype = self.scale.torch_dtype
        return (*specs, *(TensorSpec(name, dtype, (), metadata=True) for name in _SIDES if name not in named))

    def side_spec(self, side: str, role: str) -> TensorSpec:
        return TensorSpec(f"{side}_scale", self.scale.torch_dtype, ())

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        return {name: torch.ones((), dtype=self.scale.torch_dtype, device=device) for name in _SIDES}

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes under the largest magnitude of a row, every step in the weight's dtype."""
        weight = weight.to(self.scale.torch_dtype)
        limit = 127.0 if isinstance(self.element, Integer) else self.element.minifloat.maximum
        scale = blocks.block_abs_max(weight, self.sides(weight.shape)) / limit
        codes = torch.empty(weight.shape, dtype=self.element.dtype, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            steps = (weight[rows] / scale[rows if len(scale) > 1 else slice(0, 1)]).float().nan_to_num_(0.0)
            codes[rows] = self.element.round(steps)
        return Parts(codes, scale)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtypes that are stored."""
        data, packed, scale = (tensors.get(name) for name in ("weight._data", "weight._data._data", "weight._scale"))
        floats = {tensor.dtype for name, tensor in tensors.items() if name.endswith("_scale")}
        if scale is None or len(floats) > 1:  # one of them is wrong: which, the check against this format tells
            return self
        dtype = dtype_name(scale.dtype)
        if packed is not None:
            bits = self.element.bits if isinstance(self.element, Integer) else 4
            shift = tensors.get("weight._shift")
            has_zero = shift is not None and not shift.is_floating_point()
            found: QuantoWeight = grouped_format(bits, shape, dtype, has_zero=has_zero)
        elif data is not None:
            element = "int8" if data.dtype == torch.int8 else _FLOATS[dtype_name(data.dtype)]
            found = byte_format(element, dtype, is_whole=scale.ndim == 0)
        else:
            return self
        return found.replace(input=self.input, output=self.output)


@dataclass(frozen=True)
class QuantoGroups(QuantoWeight):
    """code * scale - shift, each step rounded; codes [N * K / G, G], rows that are a half or a quarter apart in a byte.

    A shift that is an integer is a zero point: (code - zero) * scale.
    """

    tells_shape: ClassVar[bool] = False

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes between the ends of each group, every step in the weight's dtype."""
        dtype = self.scale.torch_dtype
        weight = weight.to(dtype)
        low, high = blocks.block_ends(weight, self.sides(weight.shape))
        scale, shift = (high - low) / self.element.high, -low
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            part = weight[rows].unflatten(1, (scale.shape[1], -1))
            steps = ((part + shift[rows, :, None]) / scale[rows, :, None]).float().nan_to_num_(0.0)
            codes[rows] = self.element.round(steps).flatten(1)
        if dtype == torch.bfloat16 and self.element.bits == 4 and weight.shape[1] // scale.shape[1] == _TINY_GROUP:
            middle = scale * 8
            shift = middle - (middle - shift)
        return Parts(codes, scale, shift)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        layout = self.layout.layout(self.element.bits)
        rows, columns = self._grouped(shape)
        assert layout is not None
        return (TensorSpec(self.layout.name, torch.uint8, (-(-rows // layout.codes), columns)),)

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        grouped = codes.reshape(self._grouped(tuple(codes.shape)))
        return {self.layout.name: self.layout.pack(grouped, self.element)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes = self.layout.unpack(tensors[self.layout.name], self._grouped(shape), self.element)
        return codes.reshape(shape)

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Groups, and the columns of one."""
        down, across = self.grid(shape)
        return down * across, self.sides(shape)[1]

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Any shape will do: rows that do not fill a byte are made up for by zeros."""

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return None


def group_size(columns: int) -> int:
    """The columns of a group in a weight of so many columns; 0 for whole rows."""
    if columns <= _LARGEST_GROUP:
        return 0
    size = _LARGEST_GROUP
    while columns % size and size > _LEAST_GROUP:
        size -= _LEAST_GROUP
    return 0 if columns % size else size


def grouped_format(bits: int, shape: tuple[int, ...], dtype: str, *, has_zero: bool = False) -> QuantoGroups:
    """The format of packed integers for a weight of this shape."""
    return QuantoGroups(
        Integer(bits, is_signed=False),
        (1, group_size(shape[1])),
        Codes("weight._data._data", "uint8", "stream", along="apart"),
        QuantoScale("weight._scale", dtype),
        QuantoShift("weight._shift", "uint8" if has_zero else dtype, in_values=not has_zero, is_subtracted=True),
        math="stored",
    )


def byte_format(element: str, dtype: str, *, is_whole: bool = False) -> QuantoWeight:
    """The format of one byte a weight: "int8", or a minifloat by name. is_whole: one scale, as of a single row."""
    floats = {name: stored for stored, name in _FLOATS.items()}
    kind, stored = (Integer(8), "int8") if element == "int8" else (Float(element), floats[element])
    float_dtype(dtype, "dtype")
    block, scale = ((0, 0) if is_whole else (1, 0)), Scale("weight._scale", dtype, rank=0 if is_whole else 2)
    return QuantoWeight(kind, block, Codes("weight._data", stored, "single"), scale, math="stored")
