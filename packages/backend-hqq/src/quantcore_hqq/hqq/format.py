"""How one HQQ weight is stored: packed codes, scale and zero, and a full description of itself.

Source: Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/, in the safetensors layout of the hqq package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Affine,
    Family,
    Grouping,
    Reshaped,
    TensorSpec,
    WeightFormat,
    dtype_name,
    float_dtype,
    matches_type,
)
from quantcore_hqq.hqq.config import BITS
from quantcore_hqq.hqq.legacy import HqqLegacy
from quantcore_hqq.hqq.solver import group_length, grouped_shape, solve
from quantcore_hqq.hqq.widths import packing_for
from quantcore_hqq.packing import pack, packed_rows, unpack, unpack_rows, word_dtype

_UNSUPPORTED_FLAGS = ("quant_scale", "quant_zero", "offload_meta")
_ONES = ("encoded_state_dict", "stores_quant_config")


@dataclass(frozen=True)
class Hqq(WeightFormat):
    """w = (code - zero) * scale, every step in compute_dtype, in groups along axis of the grouped matrix.

    axis 1: groups are runs of group_size in the flattened weight. axis 0: the flattened weight is cut into
    group_size rows and each column is a group. group_size None: a whole row (axis 1) or column (axis 0).
    """

    family: ClassVar[str | None] = "affine"

    bits: int | float = 4
    group_size: int | None = 64
    axis: int = 1
    compute_dtype: str = "bfloat16"
    view_as_float: bool = False
    channel_wise: bool = True
    optimize: bool = True
    round_zero: bool = True

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        dtype = float_dtype(self.compute_dtype, "compute_dtype")
        rows, columns = self._grouped(shape)
        words, stored = word_dtype(self.packing), (packed_rows(rows, self.packing), columns)
        if self.view_as_float:
            words, stored = dtype, (stored[0], stored[1] * words.itemsize // dtype.itemsize)
        scale_shape, (of_codes, of_scales) = self._scale_shape(shape), self._axes(shape)
        operands = (
            TensorSpec("W_q", words, stored, is_packed=True, **of_codes),
            TensorSpec("scale", dtype, scale_shape, **of_scales),
            TensorSpec("zero", dtype, scale_shape, **of_scales),
        )
        described = self._metadata(shape)
        return operands + tuple(TensorSpec(k, v.dtype, tuple(v.shape), metadata=True) for k, v in described.items())

    def check_shape(self, shape: tuple[int, ...]) -> None:
        rows, columns = self._grouped(shape)
        packed_rows(rows, self.packing)
        itemsize = float_dtype(self.compute_dtype, "compute_dtype").itemsize
        if self.view_as_float and columns * word_dtype(self.packing).itemsize % itemsize:
            raise ValueError(
                f"view_as_float: {columns} columns of {word_dtype(self.packing)} cannot be viewed as "
                f"{self.compute_dtype}; set view_as_float to false"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        codes, scale, zero = solve(
            weight,
            bits=self.bits,
            group_size=self.group_size,
            axis=self.axis,
            channel_wise=self.channel_wise,
            optimize=self.optimize,
            round_zero=self.round_zero,
        )
        return self._stored(codes, scale, zero, shape)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values = self._codes(tensors["W_q"], shape).to(tensors["scale"].dtype)
        values = values.sub_(tensors["zero"]).mul_(tensors["scale"]).view(shape)
        return values if dtype is None else values.to(dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.reads_rows_alone(shape):
            return super().dequantize_rows(tensors, shape, rows, dtype)
        grouped = self._grouped(shape)[0]
        each = grouped // shape[0]  # rows of the code matrix for one of the weight
        own = (rows[:, None] * each + torch.arange(each, device=rows.device)).view(-1)
        values = unpack_rows(self._words(tensors["W_q"]), self.packing, grouped, own).to(tensors["scale"].dtype)
        values = values.sub_(tensors["zero"].index_select(0, own)).mul_(tensors["scale"].index_select(0, own))
        return values.view(len(rows), *shape[1:]).to(dtype or values.dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return self.axis == 1 and self.channel_wise and self._grouped(shape)[0] % shape[0] == 0

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        if "nbits" not in tensors and any(name.startswith("meta.") for name in tensors):
            return HqqLegacy(self.bits, self.group_size, self.axis).read(tensors, shape)
        bits = _read_bits(tensors["nbits"])
        flags = {
            name: _read_flag(tensors, name) for name in ("view_as_float", "channel_wise", "optimize", "round_zero")
        }
        for name in _UNSUPPORTED_FLAGS:
            if _read_flag(tensors, name):
                raise ValueError(f"{name} is set: scales quantized by hqq before 0.2 are not read in this layout")
        found = Hqq(
            bits=bits,
            group_size=_read_int(tensors, "group_size", 1, 1 << 31),
            axis=_read_int(tensors, "axis", 0, 1),
            compute_dtype=dtype_name(float_dtype(_read_text(tensors, "compute_dtype"), "compute_dtype")),
            **flags,
        )
        _expect("shape", tensors["shape"].tolist(), list(shape))
        _expect("packing", _read_text(tensors, "packing"), found.packing)
        _expect("unpack_view_dtype", _read_text(tensors, "unpack_view_dtype"), str(word_dtype(found.packing)))
        return found

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        if "W_q" not in tensors or "shape" not in tensors:
            return None
        shape = tensors["shape"].tolist()
        if not matches_type(shape, list[int]) or len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape must be two or more positive numbers, got {shape!r:.60}")
        return tuple(shape)

    @property
    def packing(self) -> str:
        """Name of the layout of packed codes."""
        return packing_for(self.bits)

    @property
    def compute_torch_dtype(self) -> torch.dtype | None:
        return float_dtype(self.compute_dtype, "compute_dtype")

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        codes = self._codes(tensors["W_q"], shape).view(shape)
        return Affine(codes, tensors["scale"].view(-1), tensors["zero"].view(-1), self._grouping(shape), self.bits)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        shape = tuple(family.shape)
        if not isinstance(family, Affine) or family.grouping != self._grouping(shape) or family.bits > self.bits:
            raise ValueError(
                f"{type(family).__name__} of {family.bits} bits in {getattr(family, 'grouping', None)} does not fit "
                f"{self!r}"
            )
        dtype = float_dtype(self.compute_dtype, "compute_dtype")
        if family.dtype != dtype:
            raise ValueError(f"scale is {family.dtype}, compute_dtype {dtype}; the product would round differently")
        codes, form = family.codes.reshape(self._grouped(shape)), self._scale_shape(shape)
        return self._stored(codes, family.scales().view(form), family.zeros().view(form), shape)

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the code matrix: grouped, or the weight's own where one range spans it."""
        if not self.channel_wise:
            return shape[0], shape[1]
        return grouped_shape(shape, self.group_size, self.axis)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not self.channel_wise:
            return ()
        rows, columns = self._grouped(shape)
        return (rows, 1) if self.axis == 1 else (1, columns)

    def _grouping(self, shape: tuple[int, ...]) -> Grouping:
        if not self.channel_wise:
            return Grouping(math.prod(shape))
        return Grouping(group_length(shape, self.group_size, self.axis), strided=self.axis == 0)

    def _axes(self, shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        """How codes and scales are cut: as rows of the weight, and of those that hold whole groups as columns."""
        if not self.reads_rows_alone(shape) and self.channel_wise:
            return {}, {}
        codes = {"along_n": (0, 1), "along_k": (1, 1), "opened": HqqCodes(self, shape)}
        if not self.channel_wise:
            return codes, {}
        grid = Reshaped((shape[0], self._grouped(shape)[0] // shape[0]))
        by_columns = None if self.group_size is None else (1, self.group_size)
        return codes, {"along_n": (0, 1), "along_k": by_columns, "opened": grid}

    def why_whole(self, along_n: bool) -> str:
        if not self.channel_wise:
            return ""
        return "a group holds values of several rows; quantize with axis=1 and a group_size that divides in_features"

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        described = {name: tensor.to(tensors[name].device) for name, tensor in self._metadata(shape).items()}
        return {**tensors, **described}

    def _codes(self, stored: Tensor, shape: tuple[int, ...]) -> Tensor:
        return unpack(self._words(stored), self.packing, self._grouped(shape)[0])

    def _words(self, stored: Tensor) -> Tensor:
        return stored.view(word_dtype(self.packing)) if self.view_as_float else stored

    def _stored(self, codes: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        dtype = float_dtype(self.compute_dtype, "compute_dtype")
        stored = {
            "W_q": self._packed(codes),
            "scale": scale.to(dtype),
            "zero": zero.to(dtype),
        }
        metadata = {name: tensor.to(codes.device) for name, tensor in self._metadata(shape).items()}
        return {**stored, **metadata}

    def _packed(self, codes: Tensor) -> Tensor:
        """Words of grouped codes."""
        words = pack(codes, self.packing)
        return words.view(float_dtype(self.compute_dtype, "compute_dtype")) if self.view_as_float else words

    def _metadata(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The description that upstream's reader asks for, all of it."""
        flags = {
            "view_as_float": self.view_as_float,
            "channel_wise": self.channel_wise,
            "optimize": self.optimize,
            "round_zero": self.round_zero,
            **dict.fromkeys(_UNSUPPORTED_FLAGS, False),
            **dict.fromkeys(_ONES, True),
        }
        texts = {
            "packing": self.packing,
            "unpack_view_dtype": str(word_dtype(self.packing)),
            "compute_dtype": f"torch.{self.compute_dtype}",
        }
        length = group_length(shape, self.group_size, self.axis)
        number = partial(torch.tensor, device="cpu")
        return {
            "shape": number(shape, dtype=torch.int64),
            "nbits": number(self.bits, dtype=torch.int32 if isinstance(self.bits, int) else torch.float32),
            "group_size": number(length, dtype=torch.int32),
            "axis": number(self.axis, dtype=torch.int32),
            **{name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()},
            **{name: number(int(flag), dtype=torch.uint8) for name, flag in flags.items()},
        }


@dataclass(frozen=True)
class HqqCodes:
    """The codes [N, K] of the packed tensor of a weight of this shape, to be cut."""

    weight_format: Hqq
    shape: tuple[int, ...]

    def open(self, stored: Tensor) -> Tensor:
        return self.weight_format._codes(stored, self.shape).reshape(self.shape)

    def close(self, numbers: Tensor) -> Tensor:
        return self.weight_format._packed(numbers.reshape(self.weight_format._grouped(tuple(numbers.shape))))


def _read_bits(tensor: Tensor) -> int | float:
    value = tensor.item()
    for bits in BITS:
        if abs(bits - value) < 1e-6:  # 1.58 is stored as a float32
            return bits
    raise ValueError(f"nbits is {value}; expected one of {', '.join(map(str, BITS))}")


def _read_int(tensors: Mapping[str, Tensor], name: str, low: int, high: int) -> int:
    value = tensors[name].item()
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected an integer in [{low}, {high}]")
    return value


def _read_flag(tensors: Mapping[str, Tensor], name: str) -> bool:
    return bool(_read_int(tensors, name, 0, 1))


def _read_text(tensors: Mapping[str, Tensor], name: str) -> str:
    try:
        return bytes(tensors[name].tolist()).decode("ascii")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected ASCII codes, got {tensors[name]!r:.80}") from error


def _expect(name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"{name} is {found!r:.80}, expected {expected!r}")
