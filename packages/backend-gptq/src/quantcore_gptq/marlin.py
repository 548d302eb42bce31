"""The layout of the Marlin kernel as a checkpoint: 4-bit codes in the order in which tensor cores read them.

Source: Frantar et al. 2024, MARLIN (arXiv:2408.11743), in the tensors that AutoGPTQ ("B", "s") and AutoAWQ write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Affine, Family, TensorSpec, WeightFormat, column_grouping, dtype_name, float_dtype, packing

_TILE = 16
_ZERO = 8
_SPAN = 1024  # codes that are reordered together: four tiles
_INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Marlin(WeightFormat):
    """w = (code - 8) * scale, one rounding in scale_dtype, in groups of group_size columns, -1 for all.

    codes, scales: suffixes of the two tensors.
    """

    family: ClassVar[str | None] = "affine"

    group_size: int = 128
    scale_dtype: str = "float16"
    codes: str = "B"
    scales: str = "s"

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = shape
        dtype = float_dtype(self.scale_dtype, "scale_dtype")
        return (
            TensorSpec(self.codes, torch.int32, (columns // _TILE, rows * _TILE // 8)),
            TensorSpec(self.scales, dtype, (columns // self._run(columns), rows)),
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        rows, columns = shape
        if columns % 128 or columns % self._run(columns) or rows % 256:
            raise ValueError(
                f"the layout 'marlin' needs in_features in multiples of 128 and of group_size {self.group_size}, and "
                f"out_features in multiples of 256; the weight is {list(shape)}; use the format gptq"
            )

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        self.check_shape(shape)
        scales = tensors.get(self.scales)
        return self if scales is None else self.replace(scale_dtype=dtype_name(scales.dtype))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        words = tensors.get(self.codes)
        return None if words is None or words.ndim != 2 else (words.shape[1] * 8 // _TILE, words.shape[0] * _TILE)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.lower(tensors, shape).dequantize(dtype)

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Affine:
        rows, columns = shape
        tiles = packing.unpack_words(tensors[self.codes], packing.stream_layout(4), rows * _TILE, 1).view(-1, _SPAN)
        tiles = tiles[:, _code_order(inverse=True, device=tiles.device)]
        codes = tiles.view(columns // _TILE, rows // _TILE, _TILE, _TILE).permute(1, 3, 0, 2).reshape(rows, columns)
        order = _scale_order(self._run(columns) < columns, inverse=True, device=tiles.device)
        scale = tensors[self.scales].reshape(-1, len(order))[:, order].view(-1, rows).t().reshape(-1)
        zero = torch.full_like(scale, _ZERO)
        return Affine(codes, scale, zero, column_grouping(columns, self._run(columns)), bits=4)

    def raise_(self, family: Family) -> dict[str, Tensor]:
        rows, columns = family.shape
        self.check_shape((rows, columns))
        if not isinstance(family, Affine) or family.bits > 4 or not bool((family.zeros() == _ZERO).all()):
            raise ValueError(f"{type(family).__name__} of {family.bits} bits: marlin holds 4 bits with zero point 8")
        tiles = family.codes.view(rows // _TILE, _TILE, columns // _TILE, _TILE).permute(2, 0, 3, 1).reshape(-1, _SPAN)
        tiles = tiles[:, _code_order(inverse=False, device=tiles.device)].view(columns // _TILE, -1)
        scale, _ = family.by_column_runs(self._run(columns))
        order = _scale_order(self._run(columns) < columns, inverse=False, device=tiles.device)
        return {
            self.codes: packing.pack_words(tiles, packing.stream_layout(4), 1),
            self.scales: scale.t().reshape(-1, len(order))[:, order].reshape(-1, rows).contiguous(),
        }

    def _run(self, columns: int) -> int:
        return columns if self.group_size == -1 else self.group_size


def _code_order(inverse: bool, device: torch.device) -> Tensor:
    """Where each of 1024 stored codes stands in four tiles [16, 16]; inverse: where each of these is stored."""
    return _index(_codes(), inverse, device)


def _scale_order(grouped: bool, inverse: bool, device: torch.device) -> Tensor:
    """The same for the scales of one group: runs of 64 rows, or of 32 where a row has one scale."""
    each = [i + 8 * j for i in range(8) for j in range(8)]
    whole = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return _index(tuple(each if grouped else whole), inverse, device)


def _index(order: tuple[int, ...], inverse: bool, device: torch.device) -> Tensor:
    index = torch.tensor(order, device=device)
    return index.argsort() if inverse else index


@cache
def _codes() -> tuple[int, ...]:
    order: list[int] = []
    for lane in range(32):  # each thread of a warp holds eight codes of each tile
        rows = (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4 + 4), 2 * (lane % 4 + 4) + 1)
        held = [_TILE * row + lane // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [256 * tile + place for tile in range(4) for place in held]
    return tuple(order[start + i] for start in range(0, _SPAN, 8) for i in _INTERLEAVE)
