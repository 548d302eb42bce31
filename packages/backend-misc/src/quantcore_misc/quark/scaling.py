"""The arithmetic of Quark's weights: scales, codes and values, in the order and the dtypes of upstream.

Scales are 0-dimensional by tensor, [N, 1] by channel and [N, G] by group. Source: AMD Quark 0.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantcore.formats.activation import abs_max
from quantcore.formats.blocks import row_pieces
from quantcore.formats.minifloat import E5M3, MiniFloat, decode, e4m3_scale, e8m0_codes, e8m0_values, encode, minifloat

if TYPE_CHECKING:
    from quantcore_misc.quark.weight import QuarkWeight

_LEAST_SCALE = 2.0**-23
_OUTER_LIMIT = 2688.0  # 448 * 6: the largest scale times the largest code
_INTEGERS = {"int8": (-128, 127), "int4": (-8, 7), "uint4": (0, 15), "uint8": (0, 255)}


class Parts(NamedTuple):
    """Codes [N, K]; scale as stored but for its shape; zero int8 or uint8; outer: the second scale, float32."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    outer: Tensor | None = None


def quantize_weight(weight: Tensor, weight_format: QuarkWeight) -> Parts:
    """The parts of a weight [N, K] in the model's dtype."""
    if weight_format.element in _INTEGERS:
        return _integers(weight, weight_format)
    return _floats(weight, weight_format)


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight_format: QuarkWeight, dtype: torch.dtype
) -> Tensor:
    """(code - zero) * scale in float32, rounded once to dtype, a few rows at a time."""
    N, K = codes.shape
    weight = torch.empty((N, K), dtype=dtype, device=codes.device)
    scale = scale.expand(N, scale.shape[1] if scale.ndim == 2 else 1)
    zeros = None if zero is None else zero.expand(scale.shape)
    for rows in row_pieces((N, K)):
        part = _values(codes[rows], weight_format.element).unflatten(1, (scale.shape[1], -1))
        if zeros is not None:
            part = part - zeros[rows, :, None]
        weight[rows] = (part * scale[rows, :, None]).flatten(1)
    return weight


def unsigned_scales(stored: Tensor, kind: str) -> Tensor:
    """Block scales of small floats in float32."""
    return decode(stored, minifloat(kind))


def _values(codes: Tensor, element: str) -> Tensor:
    return codes.float() if element in _INTEGERS else decode(codes.contiguous(), minifloat(element))


def _grouped(weight: Tensor, weight_format: QuarkWeight) -> Tensor:
    """A view [R, G, size] of the weight by what shares a scale."""
    if weight_format.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    return weight.unflatten(1, (-1, weight_format.group_size or weight.shape[1]))


def _integers(weight: Tensor, weight_format: QuarkWeight) -> Parts:
    """Scales in the weight's dtype; codes are rounded before a zero point is added, in float32."""
    low_code, high_code = _INTEGERS[weight_format.element]
    groups = _grouped(weight, weight_format)
    dtype = torch.uint8 if low_code == 0 else torch.int8
    if weight_format.is_symmetric:
        scale = abs_max(groups) / ((high_code - low_code) / 2)
        zero = torch.zeros_like(scale)
    else:
        low, high = torch.aminmax(groups, dim=2)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / (high_code - low_code)).clamp_(min=_LEAST_SCALE)
        zero = (-(low / scale).round_() + low_code).clamp_(low_code, high_code)
    scale = scale.clamp_(min=_LEAST_SCALE)
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    wide, shift = _by_rows(scale.float(), weight), _by_rows(zero, weight)
    for rows in row_pieces(tuple(weight.shape)):
        part = weight[rows].float().unflatten(1, (wide.shape[1], -1))
        steps = part / wide[rows, :, None] if weight_format.element.endswith("8") else part * (1 / wide[rows, :, None])
        codes[rows] = steps.round_().add_(shift[rows, :, None]).clamp_(low_code, high_code).flatten(1)
    return Parts(codes, scale, zero.to(dtype))


def _floats(weight: Tensor, weight_format: QuarkWeight) -> Parts:
    element = minifloat(weight_format.element)
    amax = abs_max(_grouped(weight, weight_format))
    stored, outer = amax, None
    if weight_format.scale == "e8m0":
        stored = e8m0_codes(amax, element, weight_format.mode)
        scale = e8m0_values(stored)
    elif weight_format.scale == "e4m3":
        outer = outer_scale(weight.abs().amax())
        stored = e4m3_scale(amax.float() / element.maximum / outer)
        scale = stored.float() * outer
    elif weight_format.scale == "e5m3":
        stored = encode(amax.float() / element.maximum, E5M3)
        scale = decode(stored, E5M3)
    else:
        stored = scale = (amax / element.maximum).clamp_(min=_LEAST_SCALE)
    codes = torch.empty(weight.shape, dtype=element.dtype or torch.uint8, device=weight.device)
    wide = _by_rows(scale if weight_format.scale == "float" else torch.where(scale == 0, 1.0, scale), weight)
    for rows in row_pieces(tuple(weight.shape)):
        part = weight[rows].to(wide.dtype).unflatten(1, (wide.shape[1], -1))  # float scales divide in their own dtype
        codes[rows] = _without_negative_zero(encode((part / wide[rows, :, None]).flatten(1), element), element)
    return Parts(codes, stored, torch.zeros((), device=weight.device), outer)


def _without_negative_zero(codes: Tensor, element: MiniFloat) -> Tensor:
    """Codes of less than 8 bits with one zero, as upstream's look-up gives them."""
    return codes if element.bits == 8 else codes.masked_fill_(codes == element.sign_bit, 0)


def _by_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """One number for each group of each row, [N, G]."""
    return scale.expand(weight.shape[0], scale.shape[1])


def outer_scale(amax: Tensor) -> Tensor:
    """The second scale of values up to amax, float32, 0-dimensional; 1 for zeros."""
    scale = amax.float() / _OUTER_LIMIT
    return torch.where(scale == 0, 1.0, scale)


def activation_scale(amax: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """The scale of activations up to amax, 0-dimensional, chosen in the model's dtype."""
    return (amax.to(dtype) / limit).clamp_(min=_LEAST_SCALE)
