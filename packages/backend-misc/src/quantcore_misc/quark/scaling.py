"""The arithmetic of Quark's weights: scales, codes and values, in the order and the dtypes of upstream.

Scales are 0-dimensional by tensor, [N, 1] by channel, [N, G] by group, and [ceil(N/rows), ceil(K/columns)] by block.
Source: AMD Quark 0.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, abs_max
from quantcore.formats.blocks import block_abs_max
from quantcore.formats.minifloat import E5M3, MiniFloat, decode, e4m3_scale, e8m0_codes, e8m0_values, encode, minifloat
from quantcore.formats.pieces import row_pieces
from quantcore_misc.quark.codes import INTEGERS

if TYPE_CHECKING:
    from quantcore_misc.quark.weight import QuarkWeight

Operation: TypeAlias = Callable[[Tensor, Tensor], Tensor]

LEAST_SCALE = 2.0**-23
E8M0_RULES = {"even": "even", "floor": "floor_log2", "ceil": "ceil_log2"}  # by scale_calculation_mode
_ZERO_BYTES = {"even": 1, "floor": 104, "ceil": 104}  # of blocks of zeros; 104 is LEAST_SCALE
_OUTER_LIMIT = 2688.0  # 448 * 6: the largest scale times the largest code


class Parts(NamedTuple):
    """Codes [N, K]; scale as stored but for its shape; zero int8 or uint8; outer: the second scale, float32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None


def quantize_weight(weight: Tensor, weight_format: QuarkWeight) -> Parts:
    """The parts of a weight [N, K] in the model's dtype."""
    if weight_format.element in INTEGERS:
        scale, zero = _integer_scales(weight, weight_format)
        return Parts(encode_weight(weight, scale.float(), zero, weight_format), scale, zero)
    stored, scale, outer = _float_scales(weight, weight_format)
    return Parts(encode_weight(weight, scale, None, weight_format), stored, None, outer)


def encode_weight(weight: Tensor, scale: Tensor, zero: Tensor | None, weight_format: QuarkWeight) -> Tensor:
    """Codes [N, K] of a weight under given scales, as `Packing` takes them.

    Integers are divided in float32, by more than one scale as a product with its reciprocal, and rounded before a zero
    point is added; floats are divided in the dtype of their scale.
    """
    element = weight_format.element
    dtype = _code_dtype(element)
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    divide: Operation = torch.div
    if element in INTEGERS and weight_format.strategy != "tensor":
        divide, scale = torch.mul, 1 / scale
    else:
        scale = torch.where(scale == 0, 1.0, scale)
    for rows, factor, shift in _pieces(codes, weight_format, scale, zero):
        steps = weight_format.each(divide, weight[rows].to(factor.dtype), factor)
        if element in INTEGERS:
            low, high = INTEGERS[element].ends
            steps = steps.round_() if shift is None else weight_format.each(torch.add, steps.round_(), shift)
            codes[rows] = steps.clamp_(low, high)
        else:
            codes[rows] = _without_negative_zero(encode(steps, minifloat(element)), minifloat(element))
    return codes


def dequantize_codes(
    values_of: Callable[[slice], Tensor],
    shape: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    weight_format: QuarkWeight,
    dtype: torch.dtype,
) -> Tensor:
    """(code - zero) * scale in float32, rounded once to dtype, a few rows at a time.

    values_of: gives rows of codes as numbers, float32 [r, K].
    """
    weight = torch.empty(shape, dtype=dtype, device=scale.device)
    for rows, factor, shift in _pieces(weight, weight_format, scale, zero):
        part = values_of(rows)
        if shift is not None:
            part = weight_format.each(torch.sub, part, shift)
        weight[rows] = weight_format.each(torch.mul, part, factor)
    return weight


def values_of_codes(codes: Tensor, element: str) -> Callable[[slice], Tensor]:
    """Rows of codes as numbers, for `dequantize_codes`."""
    return lambda rows: codes[rows].float() if element in INTEGERS else decode(codes[rows], minifloat(element))


def read_scales(stored: Tensor, kind: str) -> Tensor:
    """Scales in float32 as `TensorQuant.scale` says they are stored."""
    if kind == "float":
        return stored.float()
    return e8m0_values(stored) if kind == "e8m0" else decode(stored, minifloat(kind))


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
    """Scales in the weight's dtype, and zero points as numbers."""
    if weight_format.strategy == "tensor":
        low, high = torch.aminmax(weight)
    else:
        low, high = torch.aminmax(weight.unflatten(1, (-1, weight_format.group_size or weight.shape[1])), dim=2)
    ends = INTEGERS[weight_format.element].ends
    scale, zero = _scale_and_zero(low, high, *ends, is_symmetric=weight_format.is_symmetric)
    return scale, zero.to(_code_dtype(weight_format.element))


def _float_scales(weight: Tensor, weight_format: QuarkWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales as stored and as factors, and the second one."""
    element, amax = minifloat(weight_format.element), _largest(weight, weight_format)
    if weight_format.scale == "e8m0":
        mode = weight_format.mode
        stored = e8m0_codes(amax, element, E8M0_RULES[mode], _ZERO_BYTES[mode])
        return stored, e8m0_values(stored), None
    if weight_format.scale == "e4m3":
        outer = outer_scale(weight.abs().amax()).to(weight_format.second_spec("weight").dtype)
        stored = e4m3_scale(amax.float() / element.maximum / outer.float())
        stored = torch.where(stored.float() == 0, 1.0, stored.float()).to(stored.dtype)
        return stored, stored.float() * outer.float(), outer
    if weight_format.scale == "e5m3":
        stored = encode(amax.float() / element.maximum, E5M3)
        return stored, decode(stored, E5M3), None
    amax = amax if element.bits == 8 else amax.float()  # as those of other block scales
    scale = amax / element.maximum
    scale.masked_fill_(scale == 0, LEAST_SCALE)
    return scale, scale, None


def _largest(weight: Tensor, weight_format: QuarkWeight) -> Tensor:
    """The largest magnitude of what shares a scale, in the weight's dtype."""
    if weight_format.strategy == "tensor":
        return abs_max(weight.reshape(-1))
    columns = weight_format.group_size or max(1, weight.shape[1])
    return block_abs_max(weight, (weight_format.block_rows or 1, columns))


def _pieces(
    codes: Tensor, weight_format: QuarkWeight, scale: Tensor, zero: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows of a weight, with the scales and zero points of each, [r, G] or 0-dimensional."""
    count = weight_format.block_rows
    for rows in row_pieces((codes.shape[0], codes.shape[1])):
        if scale.ndim == 0:
            yield rows, scale, zero
        elif count > 1:
            yield rows, scale[torch.arange(rows.start, rows.stop, device=scale.device) // count], None
        else:
            yield rows, scale[rows], None if zero is None else zero[rows]


def each_group(operation: Operation, part: Tensor, table: Tensor, size: int) -> Tensor:
    """operation(part [r, K], the number of each group), table: [r, G] for groups of size columns, or one number.

    The last group may be short.
    """
    if table.ndim == 0:
        return operation(part, table)
    if part.shape[1] % size:
        return operation(part, table.repeat_interleave(size, 1)[:, : part.shape[1]])
    return operation(part.unflatten(1, (-1, size)), table[:, :, None]).flatten(1)


def _code_dtype(element: str) -> torch.dtype:
    if element in INTEGERS:
        return INTEGERS[element].code_dtype
    return minifloat(element).dtype or torch.uint8


def _without_negative_zero(codes: Tensor, element: MiniFloat) -> Tensor:
    """Codes of less than 8 bits with one zero, as upstream's look-up gives them."""
    return codes if element.bits == 8 else codes.masked_fill_(codes == element.sign_bit, 0)
