"""NVFP4 and MX weights of torchao: small floats under a scale for every 16 or 32 columns, which lies in tiles.

Source: torchao 0.18, prototype/mx_formats; OCP Microscaling Formats v1.0, section 6.3; NVIDIA 2025, Pretraining large
language models with NVFP4 (arXiv:2509.25149), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    Activation,
    Codes,
    Family,
    Float,
    Outer,
    Parts,
    Scale,
    TensorSpec,
    WeightFormat,
    abs_max,
    blocks,
    minifloat,
    row_chunks,
)
from quantcore_misc import tiles
from quantcore_misc.torchao.format import CODES, SCALE, TorchAoWeight

PER_TENSOR, INPUT_PER_TENSOR = "_weight_per_tensor_scale", "_weight_act_per_tensor_scale"
NVFP4_BLOCK = 16
LARGEST = 448.0 * 6.0  # of E4M3 and of E2M1
_LEAST = 2.0**-6  # a block scale; the least normal number of E4M3
_LEAST_NORMAL = 2.0**-126  # of float32
# The elements of MX weights by torchao's names: the small float, and the dtype and packing of its codes.
MX_ELEMENTS = {
    "float8_e4m3fn": ("e4m3", "float8_e4m3fn", "single"),
    "float8_e5m2": ("e5m2", "float8_e5m2", "single"),
    "float4_e2m1fn_x2": ("e2m1", "uint8", "stream"),
    "fp6_e2m3": ("e2m3", "uint8", "single"),
    "fp6_e3m2": ("e3m2", "uint8", "single"),
}
_PER_TILE = 4  # rows that lie side by side in a tile


def block_scales(limits: Tensor, outer: Tensor | None) -> Tensor:
    """Block scales float8_e4m3fn of what the largest magnitudes over 6 are, float32, under the one scale above."""
    wanted = limits if outer is None else limits / torch.where(outer == 0, 1.0, outer)
    return minifloat.e4m3_scale(wanted, _LEAST)


@dataclass(frozen=True, repr=False)
class NvFp4Input(Activation):
    """E2M1 in groups of 16 under E4M3 scales that are at least 2**-6.

    measures_outer: whether the scale above them is that of the input itself, whole, not one that is stored, or none.
    """

    measures_outer: bool = False

    @property
    def rows_apart(self) -> bool:
        return not self.measures_outer and super().rows_apart

    def _symmetric(self, x: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        amax = abs_max(self._grouped(x)).float()
        if not self.measures_outer:
            scale = block_scales(amax / 6.0, outer).float()
            return scale, _reciprocals(scale, outer)
        own = amax.amax() / LARGEST if amax.numel() else amax.new_ones(())
        scale = block_scales(amax / 6.0, own).float()
        return scale * own, _reciprocals(scale, own)


def _reciprocals(scale: Tensor, outer: Tensor | None) -> Tensor:
    """What numbers are multiplied by, in the order in which upstream divides."""
    return scale.reciprocal() if outer is None else torch.where(outer == 0, 1.0, outer).reciprocal() / scale


def nvfp4_rounding(*, is_stored: bool = False, measures_outer: bool = False) -> NvFp4Input:
    """How NVFP4 layers round their input. is_stored: whether the scale above all others is stored with the layer."""
    return NvFp4Input(
        "e2m1",
        "group",
        NVFP4_BLOCK,
        scale="e4m3",
        outer="multiply" if is_stored else None,
        quotient="multiply",
        measures_outer=measures_outer,
    )


def mx_rounding(element: str, size: int, mode: str) -> Activation:
    """How MX layers round their input."""
    return Activation(MX_ELEMENTS[element][0], "group", size, scale=f"e8m0-{mode}")


@dataclass(frozen=True)
class TiledScales(TorchAoWeight):
    """code * (scale * outer scale) in float32, rounded once.

    is_tiled: whether scales lie in tiles, as tensor cores read them, which fill up whole tiles of 128 rows and 4
    columns. Kernels read their bytes row by row; so do all functions of operands.
    """

    is_tiled: bool = True

    # What is stored

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        if not self.is_tiled:
            return super().tensor_specs(shape)
        stored = tiled_shape(self.grid(shape))
        specs = (
            dataclasses.replace(spec, shape=stored, opened=None) if spec.name == SCALE else spec
            for spec in super().tensor_specs(shape)
        )
        return tuple(dataclasses.replace(spec, along_n=None, along_k=None, opened=None) for spec in specs)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format of what is stored: the shape of the scales tells how they lie."""
        stored = tensors.get(SCALE)
        own = self.replace(is_tiled=tuple(stored.shape) != self.grid(shape)) if stored is not None else self
        assert isinstance(own, TiledScales)
        return super(TiledScales, own).read(tensors, shape)

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        found = super().operands(tensors, shape)
        if self.is_tiled:
            found[SCALE] = tiles.untile(found[SCALE], *self.grid(shape))
        return found

    def store(self, parts: Parts) -> dict[str, Tensor]:
        found = super().store(parts)
        if self.is_tiled:
            scale = found[SCALE]
            found[SCALE] = tiles.tile(scale).view(scale.dtype).view(tiled_shape(self.grid(tuple(parts.codes.shape))))
        return found

    def parts(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        found = super().parts(self.operands(tensors, shape), shape)
        return found._replace(scale=found.scale.view(self.scale.torch_dtype))

    def lower(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        return super().lower(self.operands(tensors, shape), shape)

    def lower_operands(self, operands: Mapping[str, Tensor], shape: tuple[int, ...]) -> Family:
        return super().lower(operands, shape)

    # Values

    def encode(self, weight: Tensor, factor: Tensor, zero: Tensor | None = None, *, reciprocal: bool = False) -> Tensor:
        """As for every grid, but for -0, which keeps its sign."""
        codes = super().encode(weight, factor, zero, reciprocal=reciprocal)
        if self.element.bits < 8:
            sign = self.element.bits - 1
            for rows in row_chunks(tuple(weight.shape)):
                part = weight[rows]
                codes[rows] |= ((part == 0) & part.signbit()).to(codes.dtype) << sign
        return codes


def tiled_shape(grid: tuple[int, int]) -> tuple[int, int]:
    """Of the tensor that holds the scales of a grid in tiles."""
    rows, columns = tiles.padded(*grid)
    return rows // _PER_TILE, columns * _PER_TILE


@dataclass(frozen=True)
class NvFp4Weight(TiledScales):
    """FP4 in blocks of 16 columns under scales in E4M3, and one float32 for all or none."""

    def round_weight(self, weight: Tensor) -> Parts:
        """Scales that bring the largest magnitude of each block to 6, and the largest scale to 448."""
        amax = blocks.block_abs_max(weight, self.sides(weight.shape)).float()
        outer = None
        if self.outer is not None:
            outer = amax.amax() / LARGEST if amax.numel() else amax.new_ones(())
        scale = block_scales(amax / 6.0, outer)
        codes = self.encode(weight, _reciprocals(scale.float(), outer), reciprocal=True)
        return Parts(codes, scale, None, outer)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with a scale above the others where one is stored, of the weight and of the input."""
        outer = Outer(PER_TENSOR) if PER_TENSOR in tensors else None
        rounding = self.input
        if rounding is not None and (INPUT_PER_TENSOR in tensors) != (rounding.outer is not None):
            rounding = nvfp4_rounding(is_stored=INPUT_PER_TENSOR in tensors)
        found = self.replace(outer=outer if CODES in tensors else self.outer, input=rounding)
        assert isinstance(found, NvFp4Weight)
        return super(NvFp4Weight, found).read(tensors, shape)

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """As for every grid; upstream stores NaN scales of a weight of zeros, which is one of zeros."""
        found = super().factors(scale, outer)
        return found if outer is None else torch.where(outer.float().reshape(()) == 0, 0.0, found)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        faults, scale = super().value_faults(tensors, shape), tensors[SCALE]
        outer = tensors.get(PER_TENSOR)
        is_known = not scale.is_meta and (outer is None or (not outer.is_meta and bool(outer)))
        count = int(scale.float().isnan().sum()) if is_known else 0
        return [*faults, *([f"{SCALE}: {count} of {scale.numel()} values are NaN"] if count else [])]

    def side_spec(self, side: str, role: str) -> TensorSpec:
        return TensorSpec(INPUT_PER_TENSOR, torch.float32, ())

    def measured(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        return {INPUT_PER_TENSOR: torch.maximum(-low, high).reshape(()) / LARGEST}


@dataclass(frozen=True)
class MxWeight(TiledScales):
    """Small floats under powers of two. mode: how these are chosen, "floor", "ceil", "even" or "rceil"."""

    scales_in_weight_dtype: ClassVar[bool] = False

    mode: str = "rceil"

    def round_weight(self, weight: Tensor) -> Parts:
        assert isinstance(self.element, Float)
        amax = blocks.block_abs_max(weight, self.sides(weight.shape)).float()
        scale = minifloat.e8m0_codes(amax, self.element.minifloat, self.mode)
        factor = minifloat.e8m0_values(scale)
        # Blocks of next to nothing: upstream divides by no number below the normal ones, or not at all.
        factor = torch.where(scale == 0, 1.0, factor) if self.mode == "rceil" else factor.clamp(min=_LEAST_NORMAL)
        return Parts(self.encode(weight, factor), scale.view(self.scale.torch_dtype))


def nvfp4_format(
    dtype: str, rounding: Activation | None = None, *, has_outer: bool = True, is_tiled: bool = True
) -> NvFp4Weight:
    """FP4 under scales in E4M3, and one above them where has_outer."""
    return NvFp4Weight(
        Float("e2m1"),
        (1, NVFP4_BLOCK),
        Codes(CODES, "uint8", "stream"),
        Scale(SCALE, "float8_e4m3fn"),
        outer=Outer(PER_TENSOR) if has_outer else None,
        weight_dtype=dtype,
        input=rounding,
        is_tiled=is_tiled,
    )


def mx_format(
    dtype: str, element: str, size: int, mode: str, rounding: Activation | None = None, *, is_tiled: bool = True
) -> MxWeight:
    """An element of `MX_ELEMENTS` under powers of two for every so many columns."""
    name, stored, packing = MX_ELEMENTS[element]
    return MxWeight(
        Float(name),
        (1, size),
        Codes(CODES, stored, packing),
        Scale(SCALE, "float8_e8m0fnu"),
        weight_dtype=dtype,
        input=rounding,
        is_tiled=is_tiled,
        mode=mode,
    )
