"""Rounding of a weight to codes under block scales, and back: the arithmetic that every storage format shares.

Each step rounds to the weight's own dtype, which is what makes scales and codes those of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import (
    Description,
    Element,
    Float,
    Integer,
    abs_max,
    blocks as grids,
    minifloat as floats,
    row_chunks,
    threads,
)

NVFP4_RANGE = 6.0 * floats.E4M3.maximum
_FLOAT16_ZERO_GROUP = 127  # the byte of 1: upstream's power of two is 0 in float16, and is replaced
_SCALE_DTYPES = {"e8m0": torch.uint8, "nvfp4": torch.float8_e4m3fn}
_SIGN = -(1 << 15)  # of 16 bits
_TILE = 1 << 19  # elements that one thread works on at a time; with fewer, calls cost more than they gain by caches
_SMALLEST_E4M3_SCALE = 0.125  # float8's eps, which stands in for a scale of 0


@dataclass(frozen=True)
class Scaling(Description):
    """How values become codes: the element, the block that shares a scale, and what a scale is.

    element: "int2" to "int8", or a minifloat of the core. rows, columns: of a block; 0 means all.
    scales: "float" (of the weight's dtype), "e8m0" (a power of two in a byte) or "nvfp4" (float8 under one float32 that
    divides them).
    """

    element: str
    rows: int = 1
    columns: int = 0
    is_symmetric: bool = True
    scales: str = "float"

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    @property
    def bits(self) -> int:
        return int(self.element.removeprefix("int")) if self.is_integer else self.minifloat.bits

    @property
    def minifloat(self) -> floats.MiniFloat:
        return floats.minifloat(self.element)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest code value."""
        if self.is_integer:
            return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1
        return -self.minifloat.maximum, self.minifloat.maximum

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """Of stored scales; None for that of the weight."""
        return _SCALE_DTYPES.get(self.scales)

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.is_integer else self.minifloat.dtype or torch.uint8

    def grid_element(self, *, is_shifted: bool) -> Element:
        """The element of a grid; is_shifted: integers are stored shifted to 0 and above."""
        if not self.is_integer:
            return Float(self.element)
        return Integer(self.bits, is_signed=False, bias=1 << (self.bits - 1)) if is_shifted else Integer(self.bits)

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a block of a weight of this shape."""
        return self.rows or shape[0], self.columns or shape[1]

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks there are down and across."""
        return grids.grid(shape, self.block(shape))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError with a remedy when blocks of one row do not fill a row. Larger blocks may hang over."""
        if self.rows == 1 and self.columns and shape[1] % self.columns:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of group_size {self.columns}; use a group_size that divides "
                "it, or strategy channel"
            )

    def quantize(
        self, weight: Tensor, global_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes [N, K], scales and zeros [grid], and the global scale [1] of a weight [N, K] of any float dtype.

        Codes are int8, float8, or uint8 with the bits of a smaller float; 4-bit floats are packed, [N, K / 2]. Zeros
        are int8, None when symmetric. global_scale: one to use instead of the weight's own.
        """
        shape = tuple(weight.shape)
        columns = shape[1] // 2 if self.element == "e2m1" else shape[1]
        codes = torch.empty((shape[0], columns), dtype=self.code_dtype, device=weight.device)
        return codes, *self.quantize_tiles(weight, codes.__setitem__, global_scale)

    def quantize_tiles(
        self, weight: Tensor, take: Callable[[slice, Tensor], None], global_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, zeros and the global scale as `quantize` gives them; take(rows, codes) is called for some rows at a
        time, on a CPU from several threads.
        """
        shape, whole = tuple(weight.shape), self.rows == 0
        if self.scales == "nvfp4" and global_scale is None:
            global_scale = nvfp4_global_scale(_abs_max(weight))
        if whole:
            scale, zero = self.scales_of(weight, global_scale)
        else:
            scale = torch.empty(self.grid(shape), dtype=self.scale_dtype or weight.dtype, device=weight.device)
            zero = None if self.is_symmetric else torch.empty_like(scale, dtype=torch.int8)

        def quantize(tile: tuple[slice, slice]) -> None:
            rows, blocks = tile
            if not whole:
                scale[blocks], found = self.scales_of(weight[rows], global_scale)
                if zero is not None and found is not None:
                    zero[blocks] = found
            shift = None if zero is None else zero[blocks]
            take(rows, self._encode_tile(weight[rows], scale[blocks], shift, global_scale))

        threads.share_out(quantize, self._tiles(shape), weight.device)
        return scale, zero, global_scale

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None) -> Tensor:
        """Codes [N, K] of a weight under given scales; 4-bit floats two in a byte, [N, K / 2]."""
        tiles = (
            self._encode_tile(weight[rows], scale[blocks], None if zero is None else zero[blocks], global_scale)
            for rows, blocks in self._tiles(tuple(weight.shape))
        )
        return torch.cat(list(tiles))

    def _encode_tile(self, tile: Tensor, scale: Tensor, zero: Tensor | None, global_scale: Tensor | None) -> Tensor:
        factors = self.factors(scale, global_scale, self.work_dtype(tile.dtype))
        values = torch.div(self._split(tile.to(factors.dtype)), factors[:, None, :, None])
        if zero is not None:
            values += zero[:, None, :, None]
        return self._round(values.flatten(2).flatten(0, 1)[: tile.shape[0], : tile.shape[1]])

    def work_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the arithmetic for a weight, or a float scale, of dtype.

        Under a power of two every step is exact, but float16 does not hold all of them.
        """
        return dtype if self.scales == "float" else torch.float32

    def factors(self, scale: Tensor, global_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What codes are multiplied by, in dtype."""
        if self.scales == "e8m0":
            return floats.e8m0_values(scale, dtype)
        if global_scale is not None:
            return floats.decode(scale, floats.E4M3) / global_scale
        return scale.to(dtype)

    def _round(self, values: Tensor) -> Tensor:
        """Codes of values, which are overwritten."""
        if self.is_integer:
            return values.clamp_(*self.bounds).round_().to(torch.int8)
        if self.minifloat.dtype is not None:
            return values.clamp_(*self.bounds).to(self.minifloat.dtype)
        codes = floats.encode(values, self.minifloat)
        return floats.pack_fp4(codes) if self.element == "e2m1" else codes

    def scales_of(self, weight: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros [grid] for a weight, or for rows of one that are whole blocks."""
        if not self.is_symmetric:
            return self._asymmetric_scales(weight)
        amax = grids.block_abs_max(weight, self.block(tuple(weight.shape)))
        if self.scales == "e8m0":
            rule = "even_fp4" if self.minifloat is floats.E4M3 else "even"
            zero = _FLOAT16_ZERO_GROUP if weight.dtype == torch.float16 else 0
            return floats.e8m0_codes(amax, self.minifloat, rule, zero=zero), None
        if self.scales == "nvfp4":
            assert global_scale is not None
            return self._nvfp4_scales(amax, global_scale), None
        least, largest = self.bounds
        return _no_zeros(amax / ((largest - least) / 2)), None

    def _asymmetric_scales(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows == 0:
            ends = torch.aminmax(weight)
            low, high = ends.min.clamp(max=0).view(1, 1), ends.max.clamp(min=0).view(1, 1)
        else:
            low, high = _ends(self._split(weight).transpose(1, 2).flatten(2))
        least, largest = self.bounds
        scale = (high - low) / (largest - least)
        zero = torch.nan_to_num(least - low / scale, 0.0, 0.0, 0.0).clamp_(least, largest).round_().to(torch.int8)
        return _no_zeros(scale), zero

    def _nvfp4_scales(self, amax: Tensor, global_scale: Tensor) -> Tensor:
        scale = floats.e4m3_scale(global_scale * (amax / self.minifloat.maximum).float())
        smallest = torch.tensor(_SMALLEST_E4M3_SCALE, device=amax.device).to(scale.dtype)
        return torch.where(scale.view(torch.uint8) == 0, smallest, scale)

    def _tiles(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
        """Rows, and the rows of the grid that they lie in, for each tile."""
        if self.rows == 0:
            yield from ((rows, slice(0, 1)) for rows in row_chunks(shape, _TILE))
            return
        count = max(1, _TILE // max(1, self.rows * shape[1]))
        for start in range(0, grids.grid(shape, self.block(shape))[0], count):
            yield slice(start * self.rows, (start + count) * self.rows), slice(start, start + count)

    def _split(self, tile: Tensor) -> Tensor:
        """A tile [T, K] as [blocks down, rows, blocks across, columns], filled up with zeros."""
        rows, columns = self.block(tile.shape) if self.rows else (tile.shape[0], self.block(tile.shape)[1])
        right, below = -tile.shape[1] % columns, -tile.shape[0] % rows
        if right or below:
            tile = torch.nn.functional.pad(tile, (0, right, 0, below))
        split: Tensor = tile.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return split


def _abs_max(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight, 0-dimensional."""
    found: list[Tensor] = []
    threads.share_out(
        lambda rows: found.append(abs_max(abs_max(weight[rows]))), row_chunks(weight.shape, _TILE), weight.device
    )
    return abs_max(torch.stack(found)) if found else weight.new_zeros(())


def _ends(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of the last dimension, widened to hold 0."""
    if values.itemsize != 2:
        return values.amin(-1).clamp_(max=0), values.amax(-1).clamp_(min=0)
    # The bits of positive halves are ordered as integers, those of negative ones once their sign is turned; integers
    # are compared much faster.
    bits = values.view(torch.int16)
    high, low = bits.amax(-1), bits.bitwise_xor(_SIGN).amax(-1)
    return low.clamp_(min=0).view(values.dtype).neg_(), high.clamp_(min=0).view(values.dtype)


def _no_zeros(scale: Tensor) -> Tensor:
    return scale.masked_fill_(scale == 0, torch.finfo(scale.dtype).eps)


def nvfp4_global_scale(amax: Tensor) -> Tensor:
    """What scales of NVFP4 blocks are divided by, float32 [1], for weights or inputs whose largest magnitude is amax.

    It is rounded to the dtype of amax first. Source: compressed-tensors 0.20.
    """
    whole = amax.clamp(min=torch.finfo(amax.dtype).tiny).reshape(1)
    return torch.nan_to_num(NVFP4_RANGE / whole, nan=1.0, posinf=1.0).float()
