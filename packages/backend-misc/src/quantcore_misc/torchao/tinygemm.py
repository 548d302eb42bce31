"""Int4 weights in the tiles of the tinygemm kernels, which torch has for CUDA.

Rows are filled up to a multiple of 8, columns to one of 1024. A tile holds 8 rows and 128 columns; its words lie as the
lanes of a warp take them. Source: torch, aten/src/ATen/native/cuda/int4mm.cu; torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Codes, Integer, Parts, Scale, TensorSpec, Zero, row_chunks
from quantcore_misc.torchao.format import CODES, TorchAoWeight
from quantcore_misc.torchao.solver import fit_zeros

SCALE_AND_ZERO = "_weight_scale_and_zero"
_ROWS, _COLUMNS = 8, 1024  # what sizes are filled up to multiples of
_TILE = 128  # columns
_MIDDLE = 8  # the code that stands for the zero point alone
_LEAST = torch.finfo(torch.bfloat16).smallest_normal
# A tile's codes as (row, word, place, lane, half): column 32 * word + 8 * place + 2 * lane + half of row.
_SPLIT = (4, 4, 4, 2)
_TO_WORDS = (0, 2, 1, 5, 3, 6, 4)  # of (tiles down, row, tiles across, word, place, lane, half)
_FROM_WORDS = tuple(_TO_WORDS.index(axis) for axis in range(7))


@dataclass(frozen=True)
class TiledInt4(TorchAoWeight):
    """code * scale + zero, each step rounded to bfloat16; codes from -8 to 7. algorithm: "tinygemm" or "hqq"."""

    tells_shape: ClassVar[bool] = False

    algorithm: str = "tinygemm"

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As torchao does, which fills a weight up first: what fills it counts for "hqq"."""
        if self.transform is not None:
            return self.quantize_transformed(weight)
        rows, columns = _filled(tuple(weight.shape))
        padding = (0, columns - weight.shape[1], 0, rows - weight.shape[0])
        return self.store(self.round_weight(torch.nn.functional.pad(weight.bfloat16(), padding)))

    def round_weight(self, weight: Tensor) -> Parts:
        size = self.sides(weight.shape)[1]
        if self.algorithm == "hqq":
            codes, scale, zero = fit_zeros(weight, size, 15)
            return Parts(_centred(codes), scale.bfloat16(), ((_MIDDLE - zero) * scale).bfloat16())
        grouped = weight.unflatten(1, (-1, size))
        low, high = torch.aminmax(grouped, dim=-1)
        scale = ((high - low) / 15.0).clamp_(min=_LEAST)
        zero = low + scale * 8.0
        first = zero - scale * 8.0
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            steps = (grouped[rows] - first[rows, :, None]) / scale[rows, :, None]
            codes[rows] = steps.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
        return Parts(_centred(codes), scale, zero)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        blocks_of = self.block[1]
        if shape[1] % blocks_of:
            raise ValueError(f"in_features {shape[1]} is not a multiple of group_size {blocks_of}; skip this layer")

    # What is stored

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = _filled(shape)
        own = () if self.transform is None else self.transform.specs(shape[1])
        return (
            TensorSpec(CODES, torch.int32, (rows // _ROWS, columns // _TILE, 32, 4), is_packed=True),
            TensorSpec(SCALE_AND_ZERO, torch.bfloat16, (columns // self.block[1], rows, 2)),
            *own,
        )

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of a weight's numbers; what fills it up has the value 0."""
        assert parts.zero is not None
        shape = tuple(parts.codes.shape)
        rows, columns = _filled(shape)
        size = self.block[1]
        codes = _padded(parts.codes, (rows, columns), -_MIDDLE)
        grid = rows, columns // size
        scale, zero = _padded(parts.scale, grid, _LEAST), _padded(parts.zero, grid, _MIDDLE * _LEAST)
        return {**self.pack(codes), SCALE_AND_ZERO: torch.stack((scale, zero), 2).transpose(0, 1).contiguous()}

    def parts(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        scale, zero = self.tables(tensors, shape)
        return Parts(self.unpack(tensors, shape), scale, None, None)._replace(zero=zero)

    def tables(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        down, across = self.grid(shape)
        both = tensors[SCALE_AND_ZERO].transpose(0, 1)[:down, :across]
        both = both if rows is None else both.index_select(0, rows)
        return both[..., 0], both[..., 1]

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        """Words of codes [N, K] whose sizes are filled up."""
        rows, columns = codes.shape
        tiles = (codes.to(torch.int32) + _MIDDLE).view(rows // _ROWS, _ROWS, columns // _TILE, *_SPLIT)
        words = tiles.permute(_TO_WORDS).reshape(rows // _ROWS, columns // _TILE, 32, 4, 8)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        return {CODES: (words << shifts).sum(-1, dtype=torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        words = tensors[CODES]
        down, across = words.shape[:2]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
        raw = ((words[..., None] >> shifts) & 15).to(torch.int8) - _MIDDLE
        tiles = raw.view(down, across, _ROWS, 4, 4, 2, 4)
        return tiles.permute(_FROM_WORDS).reshape(down * _ROWS, across * _TILE)[: shape[0], : shape[1]].contiguous()

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        return None


def _filled(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns with those that fill up the tiles."""
    return -(-shape[0] // _ROWS) * _ROWS, -(-shape[1] // _COLUMNS) * _COLUMNS


def _padded(numbers: Tensor, shape: tuple[int, int], value: float) -> Tensor:
    padding = (0, shape[1] - numbers.shape[1], 0, shape[0] - numbers.shape[0])
    return torch.nn.functional.pad(numbers, padding, value=value)


def _centred(codes: Tensor) -> Tensor:
    return (codes.to(torch.int8)) - _MIDDLE


def tiled_format(group_size: int, algorithm: str = "tinygemm") -> TiledInt4:
    """The packing format "tile_packed_to_4d"."""
    return TiledInt4(
        Integer(4, is_signed=False, bias=8),
        (1, group_size),
        Codes(CODES, "int32"),
        Scale(SCALE_AND_ZERO, "bfloat16"),
        Zero(SCALE_AND_ZERO, "bfloat16", in_values=True),
        math="stored",
        algorithm=algorithm,
    )
