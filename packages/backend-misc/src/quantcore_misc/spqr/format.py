"""How SpQR stores one weight: a 64-bit word for 16 columns of a row, and a sparse matrix that is added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, WeightFormat, dtype_name

PLACES = "places"  # an operand that is derived: where the columns of the weight are stored
TILE = 16  # rows and columns that share scales of scales, and columns of a word
_BITS = 3
_MASK = (1 << _BITS) - 1
_FIRST_CODE = 2 * _BITS  # above the codes of scale and zero
_FIRST_BYTE = _FIRST_CODE + TILE * _BITS  # of the tile's own scales, a byte for two rows
_TYPICAL_OUTLIERS = 0.01


class Dense(NamedTuple):
    """The dense part, columns in the stored order. R, C: tiles down and across.

    codes: [R, 16, C, 16], scale_codes and zero_codes: [R, 16, C], integers of 3 bits. second: [R, C, 4] float16, of
    each tile the scale of its scales, the scale of its zeros, the zero of its scales, the zero of its zeros.
    """

    codes: Tensor
    scale_codes: Tensor
    zero_codes: Tensor
    second: Tensor

    def values(self) -> Tensor:
        """The weight [R * 16, C * 16] float16, rounded after every operation."""
        scale_scale, zero_scale, scale_zero, zero_zero = self.second[:, None].unbind(-1)  # [R, 1, C]
        scale = scale_scale * (self.scale_codes.half() - scale_zero)
        zero = zero_scale * (self.zero_codes.half() - zero_zero)
        values = scale[..., None] * (self.codes.half() - zero[..., None])
        return values.flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Spqr(WeightFormat):
    """w = scale * (code - zero) in float16, plus outliers in float32, columns in the order of in_perm.

    by_tiles: whether outliers are listed for 16 rows together (upstream's PTCSR), every row with as many as the
    longest, and not row by row. outlier_type: dtype of the tensor of outliers; upstream writes an empty one as float32.
    """

    by_tiles: bool = False
    outlier_type: str = "int32"

    @property
    def code_bits(self) -> float:
        return float(_BITS)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        N, K = shape
        tiles = math.ceil(N / TILE) * math.ceil(K / TILE)
        rows = N // TILE if self.by_tiles else N
        outliers = int(_TYPICAL_OUTLIERS * N * K) if self.outlier_type == "int32" else 0
        return (
            TensorSpec("dense_weights", torch.int64, (tiles * TILE,)),
            TensorSpec("row_offsets", torch.int32, (rows + 1,)),
            TensorSpec("col_vals", getattr(torch, self.outlier_type), (outliers,), variable=True),
            TensorSpec("in_perm", torch.int32, (K // 2,)),
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[1] % 2 or shape[1] > 1 << 16:
            raise ValueError(
                f"in_features {shape[1]} must be even and at most 65536, as the stored order of columns needs; add the "
                "layer to modules_to_not_convert"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and outliers by the weight alone, columns in their own order; no data is needed."""
        from quantcore_misc.spqr.solver import solve

        return solve(weight, None)[0]

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return (*super().operand_names(shape), PLACES)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = {name: tensors[name] for name in super().operand_names(shape)}
        return {**found, PLACES: unpack_order(tensors["in_perm"]).argsort().to(torch.int32)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        N, K = shape
        weight = unpack(tensors["dense_weights"], shape).values()[:N, :K].float().contiguous()
        entries = tensors["col_vals"]
        if entries.numel():
            place = self._rows(tensors["row_offsets"], entries.numel()) * K + (entries & 0xFFFF)
            weight.view(-1).index_add_(0, place, _high_halves(entries))
        order = unpack_order(tensors["in_perm"])
        return torch.empty_like(weight).index_copy_(1, order, weight).to(dtype or torch.float16)

    def _rows(self, offsets: Tensor, count: int) -> Tensor:
        """The row of each outlier."""
        entry = torch.arange(count, device=offsets.device, dtype=torch.int32)
        row = torch.searchsorted(offsets, entry, right=True) - 1
        return row * TILE + (entry - offsets[row]) % TILE if self.by_tiles else row

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the list of outliers that lengths and dtypes show."""
        offsets, entries = tensors.get("row_offsets"), tensors.get("col_vals")
        if offsets is None or entries is None:
            return self
        is_empty_float = entries.numel() == 0 and entries.dtype == torch.float32
        by_tiles = shape[0] % TILE == 0 and offsets.numel() == shape[0] // TILE + 1
        return self.replace(by_tiles=by_tiles, outlier_type=dtype_name(entries.dtype) if is_empty_float else "int32")

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        offsets, order, words = (tensors.get(name) for name in ("row_offsets", "in_perm", "dense_weights"))
        if offsets is None or order is None or words is None:
            return None
        columns = 2 * order.numel()
        rows, tiled = offsets.numel() - 1, words.numel() // max(1, math.ceil(columns / TILE))
        return (rows if math.ceil(rows / TILE) * TILE == tiled else tiled), columns


def unpack(words: Tensor, shape: tuple[int, ...]) -> Dense:
    """The dense part of a weight [N, K] from its words, int64 [R * C * 16]: for each tile one for each row."""
    words = words.view(-1, math.ceil(shape[1] / TILE), TILE).transpose(1, 2)  # [R, 16, C]
    places = torch.arange(TILE, device=words.device) * _BITS + _FIRST_CODE
    codes = (words[..., None] >> places) & _MASK
    second = ((words[:, ::2] >> _FIRST_BYTE) & 0xFF).to(torch.uint8)  # [R, 8, C]
    halves = second.transpose(1, 2).contiguous().view(torch.float16)
    return Dense(codes, words & _MASK, (words >> _BITS) & _MASK, halves)


def pack(dense: Dense) -> Tensor:
    """Words int64 [R * C * 16]; the inverse of `unpack`."""
    places = torch.arange(TILE, device=dense.codes.device) * _BITS + _FIRST_CODE
    words = (dense.codes.long() << places).sum(-1) | dense.scale_codes.long() | (dense.zero_codes.long() << _BITS)
    second = dense.second.contiguous().view(torch.uint8).long().transpose(1, 2)  # [R, 8, C]
    words |= second.repeat_interleave(2, dim=1) << _FIRST_BYTE
    return words.transpose(1, 2).flatten()


def unpack_order(stored: Tensor) -> Tensor:
    """Of each stored column the column of the weight that it is, int64 [K]; two numbers of 16 bits in a word."""
    return torch.stack((stored & 0xFFFF, (stored >> 16) & 0xFFFF), -1).flatten().long()


def pack_order(order: Tensor) -> Tensor:
    """Words int32 [K / 2]; the inverse of `unpack_order`."""
    low, high = order.to(torch.int32).view(-1, 2).unbind(1)
    return low | (high << 16)


def pack_outliers(columns: Tensor, values: Tensor) -> Tensor:
    """int32 entries of columns, int64 [P], and values [P], which are rounded to float16."""
    halves = values.half().view(torch.int16).to(torch.int32)
    return (halves << 16) | columns.to(torch.int32)


def _high_halves(entries: Tensor) -> Tensor:
    """The float16 in the high half of each entry, as float32."""
    return (entries >> 16).to(torch.int16).view(torch.float16).float()
