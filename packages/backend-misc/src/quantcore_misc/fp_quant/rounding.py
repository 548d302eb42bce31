"""How FP-Quant rounds blocks of a rotated row to 4-bit floats.

Source: Egiazarian et al. 2025 (arXiv:2509.23202), section 3; Panferov et al. 2025, QuEST (arXiv:2502.05003), section 3
for scales by the standard deviation; QuTLASS 0.2 for the numbers of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import Description, minifloat, row_chunks

COLUMNS = {"mxfp4": 32, "nvfp4": 16}  # of a block
LARGEST = 448.0 * 6.0  # of E4M3 and of E2M1
_E2M1 = minifloat.E2M1
_BEST_CLIP = 2.92247856  # standard deviations of normal numbers beyond which a 4-bit float had better clip
_LEAST = 1e-8  # added to what a power of two is taken of
_MANTISSA = 23  # bits of a float32
_THIRDS = 3.0  # a power of two below the largest magnitude, which is less than 6 thirds of it


class Rounded(NamedTuple):
    """codes [R, K] of E2M1, uint8. scale [R, K/B]: bytes of E8M0 or E4M3."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, repr=False)
class BlockRounding(Description):
    """Rounding of rows to "mxfp4" or "nvfp4".

    method: scales by the largest magnitude ("abs_max") or by the standard deviation ("quest"). is_emulated: as upstream
    emulates it, with ties toward zero. An inverse scale above all others is given where it is used.
    """

    dtype: str = "nvfp4"
    method: str = "abs_max"
    is_emulated: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return _E2M1.bits

    @property
    def columns(self) -> int:
        """Of a block."""
        return COLUMNS[self.dtype]

    @property
    def is_measured(self) -> bool:
        """Whether the inverse scale above all others depends on the numbers."""
        return self.dtype == "nvfp4"

    @property
    def rows_apart(self) -> bool:
        """Whether each row is rounded by nothing that is stored."""
        return not self.is_measured

    @property
    def usual(self) -> float:
        """The inverse scale above all others where nothing was measured."""
        return 1.0 if self.method == "quest" else _THIRDS

    def quantize(self, matrix: Tensor, whole: Tensor) -> Rounded:
        """Codes and scales of a matrix [R, K], K a multiple of the block. whole: the inverse scale above all others."""
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        counts = matrix.shape[0], matrix.shape[1] // self.columns
        scale = torch.empty(counts, dtype=torch.uint8, device=matrix.device)
        for rows in row_chunks(tuple(matrix.shape), 1 << 18):
            found, scale[rows] = self._round(self._blocks(matrix[rows]), whole)
            codes[rows] = found.flatten(1)
        return Rounded(codes, scale)

    def fake_quantize(self, x: Tensor, whole: Tensor) -> Tensor:
        """What the codes of x [..., K] stand for, float32."""
        matrix = x.reshape(-1, x.shape[-1])
        values = torch.empty(matrix.shape, dtype=torch.float32, device=x.device)
        for rows in row_chunks(tuple(matrix.shape), 1 << 18):
            codes, scale = self._round(self._blocks(matrix[rows]), whole)
            values[rows] = self._values(codes, scale.unsqueeze(-1), whole).flatten(1)
        return values.view(x.shape)

    def measured(self, matrix: Tensor) -> Tensor:
        """The inverse scale [1] by which the largest magnitude is the largest number there is; else the usual one."""
        if not self.is_measured or matrix.numel() == 0:
            return torch.full((1,), self.usual, device=matrix.device)
        least, most = matrix.aminmax()
        return self.reaching(torch.maximum(-least, most))

    def reaching(self, amax: Tensor) -> Tensor:
        """`measured`, of the largest magnitude."""
        found = amax.float().reshape(1)
        return torch.where(found > 0, LARGEST / found, self.usual).clamp_(max=torch.finfo(torch.float32).max)

    # Parts

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.float().view(rows.shape[0], -1, self.columns)

    def _round(self, blocks: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and bytes of scales of blocks [r, g, B]."""
        scale = self._scales(blocks, whole)
        factor = self._factor(scale).unsqueeze(-1)
        if self.dtype == "mxfp4" and self.is_emulated:
            steps = blocks / self._emulated(factor)
        else:
            steps = (blocks * self._over(whole) / factor).masked_fill_(factor == 0, 0.0)
        return minifloat.encode(steps, _E2M1, "zero" if self.is_emulated else "even"), scale

    def _scales(self, blocks: Tensor, whole: Tensor) -> Tensor:
        """Bytes of the scales of blocks."""
        if self.dtype == "nvfp4":
            return minifloat.e4m3_scale(whole.float() * blocks.abs().amax(-1) / _E2M1.maximum).view(torch.uint8)
        if self.method == "quest":
            extent = blocks.std(-1, correction=0) * (_BEST_CLIP / _E2M1.maximum)
        else:
            extent = blocks.abs().amax(-1)
        return ((extent + _LEAST).view(torch.int32) >> _MANTISSA).to(torch.uint8)

    def _factor(self, scale: Tensor) -> Tensor:
        """float32 of bytes of scales."""
        is_power = self.dtype == "mxfp4"
        return minifloat.e8m0_values(scale) if is_power else minifloat.decode(scale, minifloat.E4M3)

    def _values(self, codes: Tensor, scale: Tensor, whole: Tensor) -> Tensor:
        numbers, factor = minifloat.decode(codes, _E2M1), self._factor(scale)
        if self.dtype == "mxfp4" and self.is_emulated:
            return numbers * self._emulated(factor)
        return numbers.mul_(factor).div_(self._over(whole))

    def _emulated(self, factor: Tensor) -> Tensor:
        """A step, from the power of two below the largest magnitude."""
        return factor if self.method == "quest" else factor / 4 / 0.75

    def _over(self, whole: Tensor) -> Tensor | float:
        """The inverse scale above all others; a constant where nothing is measured."""
        return whole.float().reshape(()) if self.is_measured else self.usual


NVFP4 = BlockRounding()
