"""How one weight of Quark is stored: codes, scales and zero points.

Source: the exports of AMD Quark 0.13; OCP Microscaling Formats 1.0 for scales of powers of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.formats import blocks
from quantcore.formats.base import TensorSpec, WeightFormat, float_dtype
from quantcore.formats.minifloat import E2M1, decode_fp4
from quantcore_misc.quark.codes import INTEGERS, Packing, layout_of, pack_integers, packing_for, unpack_integers
from quantcore_misc.quark.layer import SECONDS, SIDES, QuarkLayer
from quantcore_misc.quark.scaling import (
    Operation,
    Parts,
    dequantize_codes,
    each_group,
    quantize_weight,
    read_scales,
    values_of_codes,
)

_SCALE_TENSORS = {"e8m0": torch.uint8, "e5m3": torch.uint8, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class QuarkWeight(QuarkLayer):
    """w = (code - zero) * scale in float32, rounded once.

    element, strategy, group_size, block_rows, is_symmetric, scale, mode: as in `TensorQuant`. is_reordered: the order
    of codes in a word.
    """

    element: str = "e4m3"
    strategy: str = "tensor"
    group_size: int = 0
    block_rows: int = 0
    is_symmetric: bool = True
    scale: str = "float"
    mode: str = "even"
    is_reordered: bool = True

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        packing, scale = self.packing, _SCALE_TENSORS.get(self.scale) or float_dtype(self.scale_dtype, "scale_dtype")
        along_k = packing.along_k if self.splits_columns else None
        specs = [
            TensorSpec("weight", packing.dtype, packing.shape(*shape), along_n=packing.along_n, along_k=along_k),
            self._grid_spec("weight_scale", scale, shape),
        ]
        if self.has_zero:
            specs.append(self._zero_spec(shape))
        if self.scale == "e4m3":
            specs.append(self.second_spec("weight"))
        return (*specs, *self.activation_specs(*SIDES))

    @property
    def splits_columns(self) -> bool:
        """Whether the weight can be cut along K: codes fill bytes, and no sum is rounded before it is complete."""
        return self.packing.along_k is not None and self.output is None

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for name, size, multiple in zip(("out_features", "in_features"), shape, self.packing.multiples, strict=True):
            if size % multiple:
                raise ValueError(
                    f"{name} {size} is not a multiple of {multiple}, as {self.element} by {self.strategy} needs; "
                    "add the layer to exclude"
                )
        if self.strategy == "group" and shape[1] % self.group_size:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of group_size {self.group_size}; use another, or add the "
                "layer to exclude"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales of the weight; stored scales of activations are 1 until calibration measures them."""
        parts = quantize_weight(weight.to(float_dtype(self.dtype, "dtype")), self)
        return {**self.store(parts), **self.unmeasured(weight.device)}

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of a weight's own parts."""
        scale = parts.scale.t().contiguous() if self._is_transposed else parts.scale
        if self.scale == "float":
            scale = scale.to(float_dtype(self.scale_dtype, "scale_dtype"))
        shape = tuple(parts.codes.shape)
        tensors = {
            "weight": self.packing.pack(parts.codes),
            self.name_of("weight_scale"): scale.reshape(self._grid(shape)),
        }
        if parts.zero is not None:
            tensors[self.name_of("weight_zero_point")] = self._pack_zero(parts.zero, shape)
        if parts.outer is not None:
            tensors[SECONDS["weight"]] = parts.outer
        return tensors

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        zero = self.zeros_of(tensors, shape) if self.has_zero else None
        values, dtype = self._values(tensors["weight"], shape), dtype or float_dtype(self.dtype, "dtype")
        return dequantize_codes(values, shape, self.scales_of(tensors), zero, self, dtype)

    def _values(self, stored: Tensor, shape: tuple[int, ...]) -> Callable[[slice], Tensor]:
        """Rows of the stored codes as numbers."""
        if self.element == E2M1.name:
            return lambda rows: decode_fp4(stored[rows])
        return values_of_codes(self.packing.unpack(stored, shape[0], shape[1]), self.element)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2:
            return None
        return self.packing.size(weight.shape[0], weight.shape[1])

    def each(self, operation: Operation, part: Tensor, table: Tensor) -> Tensor:
        """operation(part [r, K], the number in table of what shares a scale)."""
        return each_group(operation, part, table, self.group_size or max(1, part.shape[1]))

    # Parts of the storage

    @property
    def packing(self) -> Packing:
        """How codes are stored."""
        return packing_for(self.element, self.strategy, self.is_reordered)

    @property
    def has_zero(self) -> bool:
        """Integers are stored with zero points, symmetric ones too."""
        return self.element in INTEGERS

    @property
    def _is_transposed(self) -> bool:
        """Whether codes are stored [K, N], and their scales and zero points [K/G, N], as integers in groups are."""
        return self.has_zero and self.strategy == "group"

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of scales."""
        if self.strategy in ("tensor", "channel"):
            return () if self.strategy == "tensor" else (shape[0],)
        down, across = blocks.grid(shape, (self.block_rows or 1, self.group_size))
        return (across, down) if self._is_transposed else (down, across)

    def _grid_spec(
        self, name: str, dtype: torch.dtype, shape: tuple[int, ...], codes: int = 1, words: int = 1
    ) -> TensorSpec:
        """The spec of one number for whatever shares a scale; `codes` of them lie in as many `words`, along N."""
        grid, along_n, along_k = self._grid(shape), None, None
        if codes > 1:
            grid = (*grid[:-1], grid[-1] // codes * words)
        if self.strategy != "tensor" and self.packing.along_n is not None:
            along_n = (int(self._is_transposed), codes // words * (self.block_rows or 1))
        if self.group_size and self.splits_columns:
            along_k = (int(not self._is_transposed), self.group_size)
        return TensorSpec(self.name_of(name), dtype, grid, along_n=along_n, along_k=along_k)

    def scales_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scales in float32, shaped as `quantize_weight` gives them."""
        scale = read_scales(tensors[self.name_of("weight_scale")], self.scale)
        if self.scale == "e4m3":
            scale = scale * tensors[SECONDS["weight"]].float()
        if self.strategy == "channel":
            return scale[:, None]
        return scale.t() if self._is_transposed else scale

    def _zero_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        dtype, layout = INTEGERS[self.element].dtype, layout_of(self.element, self.is_reordered)
        if layout is None or self.strategy == "tensor":
            return self._grid_spec("weight_zero_point", dtype, shape)
        return self._grid_spec("weight_zero_point", dtype, shape, layout.codes, layout.words)

    def _pack_zero(self, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zero points, shaped as scales are in memory, as they are stored."""
        rows = zero.t() if self._is_transposed else zero.reshape(self._grid(shape))
        return pack_integers(rows.contiguous(), self.element, self.is_reordered)

    def zeros_of(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Zero points as numbers, shaped as `scales_of` gives scales; the inverse of `_pack_zero`."""
        stored = tensors[self.name_of("weight_zero_point")]
        zero = unpack_integers(stored, shape[0], self.element, self.is_reordered)
        if self.strategy == "channel":
            return zero[:, None]
        return zero.t() if self._is_transposed else zero


def codes_of(weight_format: WeightFormat) -> str | None:
    """What one code of the weight is, as `product_kernels` asks; symmetric integers have zero points of 0."""
    if type(weight_format) is not QuarkWeight or weight_format.strategy not in ("tensor", "channel"):
        return None
    if weight_format.element == "int8":
        return "int8" if weight_format.is_symmetric else None
    return "float8" if weight_format.element == "e4m3" and weight_format.scale == "float" else None
