"""How Model Optimizer stores one weight: FP4 under two scales, FP8 under one, or either under powers of two.

Source: nvidia-modelopt 0.47; NVIDIA 2025, Pretraining large language models with NVFP4 (arXiv:2509.25149), section 2;
OCP Microscaling Formats (MX) v1.0, section 6.3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.sdk import (
    Activation,
    Codes,
    Float,
    Outer,
    Parts,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    blocks,
    dtype_name,
    minifloat,
    transforms,
)

BLOCK, MX_BLOCK = 16, 32
LARGEST_FP8 = 448.0  # of E4M3
LARGEST = LARGEST_FP8 * 6.0  # of E4M3 and of E2M1
_LEAST_SCALE = 2.0**-9  # the least number of E4M3 above 0
_DIVISOR = "pre_quant_scale"
_CACHE_SCALES = ("k_scale", "v_scale")
FP4_INPUT = Activation("e2m1", "group", BLOCK, scale="e4m3", outer="multiply")
FP8_INPUT = Activation("e4m3", "tensor", is_static=True)  # and keys and values
MX_INPUT = Activation("e4m3", "group", MX_BLOCK, scale="e8m0-rceil", quotient="multiply")


@dataclass(frozen=True)
class ModelOptWeight(Scaled):
    """code * (scale * outer scale) in float32. What is stored of the input is one number, input_scale.

    carried: the scales that a file stores with the layer for the cache of keys and values.
    """

    carried: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return self.carried

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        carried = (TensorSpec(name, torch.float32, (), metadata=True) for name in self.carried)
        return (*super().tensor_specs(shape), *carried)

    def side_spec(self, side: str, role: str) -> TensorSpec:
        return TensorSpec(f"{side}_scale", torch.float32, ())

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format that dtypes and names show: files of mixed precision call FP8 and FP4 tensors alike."""
        weight, scale = tensors.get("weight"), tensors.get("weight_scale")
        if weight is None or scale is None:
            return self
        found = _stored_format(weight, scale)
        is_as_configured = (found.element, found.scale) == (self.element, self.scale)
        rounding = self.input if is_as_configured and self.input is not None else found.input
        is_complete = rounding is not None and (not rounding.is_measured or "input_scale" in tensors)
        scaled = tensors.get(_DIVISOR)
        transform = None if scaled is None else transforms.ColumnScale(_DIVISOR, dtype_name(scaled.dtype))
        return found.replace(
            input=rounding if is_complete else None,
            transform=transform,
            carried=tuple(name for name in _CACHE_SCALES if name in tensors),
        )


@dataclass(frozen=True)
class NvFp4(ModelOptWeight):
    """FP4 in blocks of 16 columns, under scales in E4M3 and one float32 for all."""

    @property
    def largest(self) -> float:
        """What the largest magnitude is brought to: where inputs are FP8, weights without the outer scale fit it."""
        return LARGEST_FP8 if self.input == FP8_INPUT else LARGEST

    def round_weight(self, weight: Tensor) -> Parts:
        """Scales that bring the largest magnitude of each block to 6, and that of the weight to `largest`."""
        amax = blocks.block_abs_max(weight, self.sides(weight.shape)).float()
        outer = amax.amax() / self.largest if amax.numel() else amax.new_ones(())
        wanted = (amax / (outer * 6.0)).nan_to_num(0.0).clamp(_LEAST_SCALE, 448.0)
        scale = self.scale.encode(torch.where(amax == 0, 1.0, wanted))
        factor = self.factors(scale, outer)
        return Parts(self.encode(weight, torch.where(factor == 0, 1.0, factor)), scale, None, outer)

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """As for every grid; upstream stores NaN scales of a weight of zeros, which is one of zeros."""
        found = super().factors(scale, outer)
        return found if outer is None else torch.where(outer.float().reshape(()) == 0, 0.0, found)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        faults = super().value_faults(tensors, shape)
        scale, outer = tensors[self.scale.name], tensors["weight_scale_2"]
        count = 0 if scale.is_meta or outer.is_meta or not bool(outer) else int(scale.float().isnan().sum())
        return [*faults, *([f"{self.scale.name}: {count} of {scale.numel()} values are NaN"] if count else [])]


@dataclass(frozen=True)
class Microscaled(ModelOptWeight):
    """FP4 or FP8 in blocks of 32 columns, under powers of two in a byte each."""

    def round_weight(self, weight: Tensor) -> Parts:
        """The least powers of two by which blocks fit the element, by way of a logarithm as upstream has them."""
        amax = blocks.block_abs_max(weight, self.sides(weight.shape)).float()
        assert isinstance(self.element, Float)
        scale = minifloat.e8m0_codes(amax, self.element.minifloat, "rceil")
        return Parts(self.encode(weight, self.factors(scale)), scale)


def fp4_format(rounding: Activation | None = None) -> NvFp4:
    """The format of FP4; rounding: of the input, None where it stays float."""
    codes, scale = Codes("weight", "uint8", "stream"), Scale("weight_scale", "float8_e4m3fn")
    return NvFp4(Float("e2m1"), (1, BLOCK), codes, scale, outer=Outer("weight_scale_2"), input=rounding)


def fp8_format(rounding: Activation | None = None) -> ModelOptWeight:
    """The format of FP8 under one scale."""
    codes, scale = Codes("weight", "float8_e4m3fn", "single"), Scale("weight_scale", "float32", rank=0)
    return ModelOptWeight(Float("e4m3"), (0, 0), codes, scale, input=rounding)


def mxfp8_format() -> Microscaled:
    """The format of FP8 under powers of two, whose inputs are rounded likewise."""
    return _microscaled("e4m3", Codes("weight", "float8_e4m3fn", "single"), MX_INPUT)


def mxfp4_format() -> Microscaled:
    """The format of FP4 under powers of two, whose inputs are FP8."""
    return _microscaled("e2m1", Codes("weight", "uint8", "stream"), FP8_INPUT)


def _microscaled(element: str, codes: Codes, rounding: Activation) -> Microscaled:
    return Microscaled(Float(element), (1, MX_BLOCK), codes, Scale("weight_scale", "uint8"), input=rounding)


def _stored_format(weight: Tensor, scale: Tensor) -> ModelOptWeight:
    """The format of stored tensors by their dtypes, with the rounding of inputs that most often goes with it."""
    is_fp8, is_power = weight.dtype == torch.float8_e4m3fn, scale.dtype == torch.uint8
    if is_power:
        return mxfp8_format() if is_fp8 else mxfp4_format()
    return fp8_format(FP8_INPUT) if is_fp8 else fp4_format(FP4_INPUT)
