"""How MLX stores one weight: codes in one stream of bits a row, and a scale and an offset for each group.

Source: mlx 0.32 (mx.quantize), transformers 5.23 (metal).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantcore.sdk import Codes, Float, Integer, Parts, Scale, Scaled, WeightFormat, Zero, blocks

_WORD = 32
_LEAST = 1e-8  # of a scale, as transformers has it
_LEAST_OF_MLX = 1e-7
_NEGATIVE_ZERO, _ONE = 8, 127  # of E2M1, and of E8M0
_OFFSETS = ("qbiases", "biases")
# Element, and what a scale byte is, of MLX's small floats.
_FLOATS = {"mxfp4": ("e2m1", "e8m0"), "nvfp4": ("e2m1", "e4m3"), "mxfp8": ("e4m3", "e8m0")}


@dataclass(frozen=True)
class MetalWeight(Scaled):
    """code * scale + offset, as transformers has it: in float32, rounded once to the dtype of the scales."""

    def round_weight(self, weight: Tensor) -> Parts:
        low, high = (end.float() for end in blocks.block_ends(weight, self.sides(weight.shape)))
        scale = ((high - low) / self.element.high).clamp_(min=_LEAST)
        return self._stored(weight, scale, low)

    def _stored(self, weight: Tensor, scale: Tensor, offset: Tensor) -> Parts:
        """The nearest codes under unrounded float32 numbers, which are then stored."""
        assert self.zero is not None
        codes = self.encode(weight, scale, offset)
        return Parts(codes, self.scale.encode(scale), offset.to(self.zero.torch_dtype))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        if shape[-1] % self.block[1] or shape[-1] % _WORD:
            raise ValueError(
                f"in_features {shape[-1]} is not a multiple of {_WORD} and of group_size {self.block[1]}; use another, "
                "or add the layer to modules_to_not_convert"
            )

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the name of the offsets and the dtype of the scales that are stored."""
        return _as_stored(self, tensors)


@dataclass(frozen=True)
class MlxWeight(MetalWeight):
    """code * scale + offset, each step rounded to the dtype of the scales, which may be negative."""

    def round_weight(self, weight: Tensor) -> Parts:
        """Scale and offset by which 0 and the end of larger magnitude are stored exactly."""
        low, high = (end.float() for end in blocks.block_ends(weight, self.sides(weight.shape)))
        scale = ((high - low) / self.element.high).clamp_(min=_LEAST_OF_MLX)
        is_low = low.abs() > high.abs()
        scale, edge = torch.where(is_low, scale, -scale), torch.where(is_low, low, high)
        steps = (edge / scale).round_()
        has_steps = steps != 0
        scale = torch.where(has_steps, edge / steps, scale)
        return self._stored(weight, scale, torch.where(has_steps, edge, 0.0))


@dataclass(frozen=True)
class MlxFloat(Scaled):
    """Small floats under scales of one byte; no offsets. Codes of 4 bits have no negative zero."""

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes, by the base's scales; a block of zeros has the scale 1, or 0 where scales are E4M3."""
        parts = super().round_weight(weight)
        codes, scale = parts.codes, parts.scale
        if self.element.bits == 4:
            codes = codes.masked_fill(codes == _NEGATIVE_ZERO, 0)
        is_zero = blocks.block_abs_max(weight, self.sides(weight.shape)) == 0
        return Parts(codes, scale.masked_fill(is_zero, _ONE if self.scale.kind_name == "e8m0" else 0))


def affine_format(bits: int, group_size: int, dtype: str, *, is_mlx: bool) -> MetalWeight:
    """The format of integers under float scales, in files of MLX or of transformers."""
    kind = MlxWeight if is_mlx else MetalWeight
    return kind(
        Integer(bits, is_signed=False),
        (1, group_size),
        Codes("weight", "uint32", "stream"),
        Scale("scales", dtype),
        Zero(_OFFSETS[is_mlx], dtype, in_values=True),
        math="stored" if is_mlx else "float32",
    )


def float_format(mode: str, group_size: int) -> MlxFloat:
    """The format of one of MLX's small floats."""
    element, kind = _FLOATS[mode]
    return MlxFloat(
        Float(element), (1, group_size), Codes("weight", "uint32", "stream"), Scale("scales", "uint8", kind=kind)
    )


def _as_stored(weight_format: MetalWeight, tensors: Mapping[str, Tensor]) -> WeightFormat:
    name = next((name for name in _OFFSETS if name in tensors), None)
    scales = tensors.get("scales")
    if name is None or scales is None or weight_format.zero is None:
        return weight_format
    if tensors[name].dtype != scales.dtype:  # one of them is wrong: which, the check against this format tells
        return weight_format
    is_mlx = name == _OFFSETS[1]
    dtype = str(scales.dtype).removeprefix("torch.")
    found = affine_format(weight_format.element.bits, weight_format.block[1], dtype, is_mlx=is_mlx)
    return replace(found, transform=weight_format.transform)
