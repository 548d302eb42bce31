"""The arithmetic of Quark's weights: scales, codes and values, in the order and the dtypes of upstream.

Source: AMD Quark 0.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantcore.sdk import Activation, Parts, blocks, float_dtype, minifloat, row_chunks

if TYPE_CHECKING:
    from quantcore_misc.quark.weight import QuarkWeight

LEAST_SCALE = 2.0**-23
E8M0_RULES = {"even": "even", "floor": "floor_log2", "ceil": "ceil_log2"}  # by scale_calculation_mode
_ZERO_BYTES = {"even": 1, "floor": 104, "ceil": 104}  # of blocks of zeros; 104 is LEAST_SCALE
_OUTER_LIMIT = 2688.0  # 448 * 6: the largest scale times the largest code


def quantize_weight(weight: Tensor, weight_format: QuarkWeight) -> Parts:
    """The parts of a weight [N, K] in the model's dtype; float scales are not yet of the dtype that stores them."""
    if weight_format.has_zero:
        scale, zero = _integer_scales(weight, weight_format)
        return Parts(encode_weight(weight, scale.float(), zero, weight_format), scale, zero)
    stored, scale, outer = _float_scales(weight, weight_format)
    return Parts(encode_weight(weight, scale, None, weight_format), stored, None, outer)


def encode_weight(weight: Tensor, scale: Tensor, zero: Tensor | None, weight_format: QuarkWeight) -> Tensor:
    """Codes [N, K] of a weight under given scales and zero points [grid].

    Integers are divided in float32, by more than one scale as a product with its reciprocal, and rounded before a zero
    point is added; floats are divided in the dtype of their scale.
    """
    element, block = weight_format.grid_format.element, weight_format.grid_format.sides(weight.shape)
    codes = torch.empty(weight.shape, dtype=element.dtype, device=weight.device)
    has_reciprocals = weight_format.has_zero and weight_format.strategy != "tensor"
    scale = 1 / scale if has_reciprocals else torch.where(scale == 0, 1.0, scale)
    for rows in row_chunks((weight.shape[0], weight.shape[1])):
        steps = weight[rows].to(scale.dtype, copy=True)
        blocks.each_block_(Tensor.mul_ if has_reciprocals else Tensor.div_, steps, scale, block, rows)
        if zero is not None:
            steps = blocks.each_block_(Tensor.add_, steps.round_(), zero, block, rows)
        codes[rows] = element.round(steps)
    if element.bits < 8 and not weight_format.has_zero:
        codes.masked_fill_(codes == 1 << (element.bits - 1), 0)  # no negative zero, as upstream's look-up
    return codes


def outer_scale(amax: Tensor) -> Tensor:
    """The second scale of values up to amax, float32, 0-dimensional; 1 for zeros."""
    scale = amax.float() / _OUTER_LIMIT
    return torch.where(scale == 0, 1.0, scale)


def range_scale(low: Tensor, high: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Scale and zero point of activations between low and high, 0-dimensional, in their dtype."""
    smallest, largest = activation.code_range
    return _scale_and_zero(low, high, smallest, largest, is_symmetric=activation.is_symmetric)


def _scale_and_zero(
    low: Tensor, high: Tensor, smallest: float, largest: float, *, is_symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, in the dtype of low and high, for codes from smallest to largest."""
    if is_symmetric:
        scale = (torch.maximum(low.abs(), high.abs()) / ((largest - smallest) / 2)).clamp_(min=LEAST_SCALE)
        middle = (smallest + largest + 1) // 2 if smallest == 0 else 0.0
        return scale, torch.full_like(scale, middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (largest - smallest)).clamp_(min=LEAST_SCALE)
    steps = low.float() / scale.float() if low.ndim == 0 else low / scale  # the one scale of a tensor is float32
    return scale, (smallest - steps.round_()).clamp_(smallest, largest)


def _integer_scales(weight: Tensor, weight_format: QuarkWeight) -> tuple[Tensor, Tensor]:
    """Scales [grid] in the weight's dtype, and zero points as numbers."""
    element = weight_format.grid_format.element
    if weight_format.strategy == "tensor":
        low, high = torch.aminmax(weight)
    else:
        low, high = torch.aminmax(weight.unflatten(1, (-1, weight_format.group_size or weight.shape[1])), dim=2)
    scale, zero = _scale_and_zero(low, high, element.low, element.high, is_symmetric=weight_format.is_symmetric)
    grid = weight_format.grid_format.grid(tuple(weight.shape))
    return scale.reshape(grid), zero.to(element.dtype).reshape(grid)


def _float_scales(weight: Tensor, weight_format: QuarkWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales [grid] as stored and as factors, and the second one."""
    grid = weight_format.grid_format
    element, amax = minifloat.minifloat(weight_format.element), blocks.block_abs_max(weight, grid.sides(weight.shape))
    if weight_format.scale == "e8m0":
        mode = weight_format.mode
        stored = minifloat.e8m0_codes(amax, element, E8M0_RULES[mode], _ZERO_BYTES[mode])
        return stored, minifloat.e8m0_values(stored), None
    if weight_format.scale == "e4m3":
        outer = outer_scale(weight.abs().amax()).to(float_dtype(weight_format.second_dtype("weight"), "weight_scale_2"))
        stored = minifloat.e4m3_scale(amax.float() / element.maximum / outer.float())
        stored = torch.where(stored.float() == 0, 1.0, stored.float()).to(stored.dtype)
        return stored, stored.float() * outer.float(), outer
    if weight_format.scale == "e5m3":
        stored = minifloat.encode(amax.float() / element.maximum, minifloat.E5M3)
        return stored, minifloat.decode(stored, minifloat.E5M3), None
    amax = amax if element.bits == 8 else amax.float()  # as those of other block scales
    scale = amax / element.maximum
    scale.masked_fill_(scale == 0, LEAST_SCALE)
    return scale, scale, None
