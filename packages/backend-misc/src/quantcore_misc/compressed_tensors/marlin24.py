"""The format marlin-24: 2:4 sparse integers in the order in which the Marlin kernel reads them.

Source: compressed-tensors 0.9.4, which writes it; nothing upstream reads it back but the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import TensorSpec, cached_tensors, packing
from quantcore_misc.compressed_tensors.sparse import KEPT, RUN, largest_two
from quantcore_misc.compressed_tensors.weight import CompressedWeight, UnpackedWeight

_TILE = 16
_CHUNK = 1024  # values that are permuted together: four tiles
_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_SCALE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the runs of 8 in 64 columns
_BITS = 2  # of the place of a value among four
_PADDING = {0: (2, 3), 1: (0, 2), 2: (1, 2), 4: (2, 3), 8: (2, 3)}  # which places hold one value or none -> which two


@dataclass(frozen=True)
class Marlin24Weight(UnpackedWeight):
    """Codes of 4 or 8 bits of which two in four neighbours are kept; float16 scales per group or row.

    A weight [N, K] needs K a multiple of 32 and N of 64.
    """

    dtype: str = "float16"  # the only one that the kernel has

    @classmethod
    def holds(cls, tensors: Mapping[str, Tensor]) -> bool:
        return "weight_packed" in tensors and "meta" in tensors

    def scale_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        assert self.scaling is not None
        return (TensorSpec("scale_packed", self.torch_dtype, self.scaling.grid(shape)[::-1]),)

    def code_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        assert self.scaling is not None
        rows, columns = shape
        words = (columns // 32, rows * _TILE * self.scaling.bits // 32)
        return (
            TensorSpec("weight_packed", torch.int32, words),
            TensorSpec("meta", torch.int16, (columns // 32, 2 * rows)),
        )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        if shape[1] % 32 or shape[0] % 64:
            raise ValueError(f"marlin-24 needs in_features a multiple of 32 and out_features of 64, got {list(shape)}")
        if self.scaling is None or self.scaling.element not in ("int4", "int8") or not self.scaling.is_symmetric:
            raise ValueError("marlin-24 stores symmetric codes of 4 or 8 bits; choose another format")

    def store_scales(self, scale: Tensor, zero: Tensor | None, shape: tuple[int, ...]) -> dict[str, Tensor]:
        stored = scale.t()
        if self._permutes_scales(shape):
            stored = stored.reshape(-1, 8, 8)[:, :, list(_SCALE_ORDER)].reshape(stored.shape)
        return {"scale_packed": stored.contiguous()}

    def read_scales(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, None]:
        stored = tensors["scale_packed"]
        if self._permutes_scales(shape):
            back = torch.tensor(_SCALE_ORDER, device=stored.device).argsort()
            stored = stored.reshape(-1, 8, 8)[:, :, back].reshape(stored.shape)
        return stored.t(), None

    def pack(self, codes: Tensor) -> dict[str, Tensor]:
        assert self.scaling is not None
        codes = codes.where(largest_two(codes), 0)
        places = _places(codes)
        kept = codes.unflatten(1, (-1, RUN)).gather(-1, places).flatten(1)
        values = _tiled(kept.t()).reshape(-1, _CHUNK)[:, _permutation(self.scaling.bits).to(codes.device)]
        shifted = values.reshape(codes.shape[1] // 32, -1).view(torch.uint8) + (1 << (self.scaling.bits - 1))
        return {
            "weight_packed": packing.pack_words(shifted, packing.stream_layout(self.scaling.bits), dim=1),
            "meta": _pack_meta(places),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        assert self.scaling is not None
        bits, (rows, columns) = self.scaling.bits, shape
        shifted = packing.unpack_words(tensors["weight_packed"], packing.stream_layout(bits), rows * _TILE, dim=1)
        values = shifted.sub_(1 << (bits - 1)).view(torch.int8).reshape(-1, _CHUNK)
        kept = _untiled(values[:, _permutation(bits).argsort().to(values.device)], (columns // 2, rows)).t()
        places = _unpack_meta(tensors["meta"], (rows, columns))
        codes = kept.new_zeros(rows, columns // RUN, RUN)
        return codes.scatter_(-1, places, kept.reshape(rows, -1, KEPT)).flatten(1)

    def as_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> CompressedWeight:
        found = super().as_stored(tensors, shape)
        assert isinstance(found, Marlin24Weight)
        return dataclasses.replace(found, dtype="float16")

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        meta = tensors.get("meta")
        return None if meta is None else (meta.shape[1] // 2, meta.shape[0] * 32)

    def _permutes_scales(self, shape: tuple[int, ...]) -> bool:
        assert self.scaling is not None
        return self.scaling.block(shape)[1] < shape[1] // 2


def _places(codes: Tensor) -> Tensor:
    """The places of the two values kept of each four neighbours, ascending: [N, K / 4, 2] int64."""
    filled = (codes != 0).unflatten(1, (-1, RUN))
    weights = torch.tensor([1, 2, 4, 8], device=codes.device)
    return _pairs(codes.device)[(filled * weights).sum(-1)]


@cached_tensors
def _pairs(device: torch.device) -> Tensor:
    """The two places by the bits of which are filled, [16, 2]."""
    pairs = [
        _PADDING.get(filled) or [place for place in range(RUN) if filled >> place & 1][:KEPT] for filled in range(16)
    ]
    return torch.tensor(pairs, device=device)


def _tiled(matrix: Tensor) -> Tensor:
    """A matrix as tiles of 16 x 16 one after the other, row by row of tiles."""
    tiles: Tensor = matrix.unflatten(1, (-1, _TILE)).unflatten(0, (-1, _TILE)).transpose(1, 2)
    return tiles


def _untiled(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of tiles; the inverse of `_tiled`."""
    return tiles.reshape(shape[0] // _TILE, shape[1] // _TILE, _TILE, _TILE).transpose(1, 2).reshape(shape)


@cached_tensors
def _permutation(bits: int) -> Tensor:
    """Which value of a chunk stands at each place."""
    order = torch.tensor(_INTERLEAVE[bits])
    place = torch.arange(_CHUNK)
    place = place // len(order) * len(order) + order[place % len(order)]
    i, j, t, r = place // 32, place // 8 % 4, place // 4 % 2, place % 4
    row = 2 * (i % 4) + (r & 1) + 8 * (r >> 1)
    return 16 * row + 256 * (i // 8) + 8 * (i // 4 % 2) + 4 * t + j


def _pack_meta(places: Tensor) -> Tensor:
    """Places [N, K / 4, 2] as words of four pairs, in the order of the kernel: [K / 32, 2 N] int16."""
    rows = places.shape[0]
    pairs = (places[..., 0] | places[..., 1] << _BITS).to(torch.uint8)
    words = packing.pack_words(pairs, packing.stream_layout(4, 16), dim=1)  # [N, K / 16]
    stored = torch.empty_like(words).view(-1)
    stored[_meta_offsets(rows, words.shape[1], words.device)] = words.flatten()
    return stored.view(-1, 2 * rows)


def _unpack_meta(meta: Tensor, shape: tuple[int, int]) -> Tensor:
    """Places of `_pack_meta`, for a weight of this shape."""
    rows, columns = shape
    words = meta.flatten()[_meta_offsets(rows, columns // 16, meta.device)].view(rows, -1)
    pairs = packing.unpack_words(words, packing.stream_layout(4, 16), columns // RUN, dim=1)
    return torch.stack((pairs & 3, pairs >> _BITS), -1).long()


def _meta_offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    """Where each word of [rows, columns] is stored, flat."""
    r, c = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    row = r // 64 * 64 + r % 2 * 2 + r % 8 // 4 + r % 32 % 4 // 2 * 32 + r % 64 // 8 * 4
    swap = (row % 2 == 0).int() * (c % 2) - (row % 2) * (c % 2 == 0).int()
    row, column = row + swap, c - swap
    return (column // 2 * 2 * rows + 2 * row + column % 2).flatten()
