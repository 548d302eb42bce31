"""Floats of 8 bits and fewer: their grids, rounding, packing, and the powers of two that scale blocks of them.

Source: OCP Microscaling Formats (MX) v1.0 for E2M1, E2M3, E3M2 and E8M0; FP8 Formats for Deep Learning
(arXiv:2209.05433) for E4M3 and E5M2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.formats.cached import cached_tensors

TIES = ("even", "away", "zero")
E8M0_RULES = ("floor", "ceil", "floor_log2", "ceil_log2", "even", "even_fp4", "round_up", "rceil")
E8M0_NAN = 255
_E8M0_BIAS = 127
_BY_LOGARITHM = {"floor_log2": torch.floor, "ceil_log2": torch.ceil}
_FLOAT32_MANTISSA = 23
_EXPONENT_MASK = 0x7F800000
_WIDE = {2: torch.int32, 4: torch.int64}  # bytes of a value -> an integer that holds two of them


@dataclass(frozen=True)
class MiniFloat:
    """A float of few bits: sign (unless unsigned), exponent, mantissa, from high to low.

    maximum: the largest finite magnitude. dtype: the torch dtype that holds it, None for codes in the low bits of
    uint8. None of the sub-byte floats has inf or NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    maximum: float
    dtype: torch.dtype | None = None
    is_signed: bool = True

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + self.is_signed

    @property
    def sign_bit(self) -> int:
        """The bit of a code that makes it negative; 0 for an unsigned float."""
        return 1 << (self.bits - 1) if self.is_signed else 0

    @property
    def smallest_normal(self) -> float:
        return float(2.0 ** (1 - self.bias))

    @property
    def least(self) -> float:
        """The least positive number."""
        return self.smallest_normal * 2.0**-self.mantissa_bits

    @property
    def largest_exponent(self) -> int:
        """floor(log2(maximum)): what the scale of a block is lower by than its largest element."""
        return math.frexp(self.maximum)[1] - 1


E4M3 = MiniFloat("e4m3", 4, 3, 7, 448.0, torch.float8_e4m3fn)
E5M2 = MiniFloat("e5m2", 5, 2, 15, 57344.0, torch.float8_e5m2)
E2M1 = MiniFloat("e2m1", 2, 1, 1, 6.0)
E2M3 = MiniFloat("e2m3", 2, 3, 1, 7.5)
E3M2 = MiniFloat("e3m2", 3, 2, 3, 28.0)
E5M3 = MiniFloat("e5m3", 5, 3, 15, 122880.0, is_signed=False)  # a block scale; every code is finite

MINIFLOATS = {element.name: element for element in (E4M3, E5M2, E2M1, E2M3, E3M2, E5M3)}


def minifloat(name: str) -> MiniFloat:
    """The float of a name. Raises ValueError listing the known ones."""
    try:
        return MINIFLOATS[name]
    except KeyError:
        raise ValueError(f"{name!r:.40} is no minifloat; one of {', '.join(MINIFLOATS)}") from None


# Values and codes


def round_values(values: Tensor, element: MiniFloat, ties: str = "even") -> Tensor:
    """values on the grid of an element, saturated at its maximum, as float32 of any shape.

    ties: "even", or "away" from or toward "zero" for elements below 8 bits. What rounds to zero keeps its sign, but for
    -0 itself in elements below 8 bits. NaN stays NaN in 8 bits; the others have none, and give any level.
    """
    if element.bits < 8:
        _, rounded = _nearest(element, ties, values.device)
        return rounded.index_select(0, _cells(values, element)).view(values.shape)
    _check_even(element, ties)
    clamped = values.float().clamp(-element.maximum if element.is_signed else 0.0, element.maximum)
    if element.dtype is not None:
        return decode(clamped.to(element.dtype), element)
    # The power of two of each value, no less than that of the smallest normal, gives the spacing of its grid.
    quantum = clamped.view(torch.int32).bitwise_and(_EXPONENT_MASK).view(torch.float32)
    quantum.clamp_(min=element.smallest_normal).mul_(2.0**-element.mantissa_bits)
    return (clamped / quantum).round_().mul_(quantum)


def encode(values: Tensor, element: MiniFloat, ties: str = "even") -> Tensor:
    """Codes of values: of the element's dtype, or uint8 with the code in the low bits. Rounds as `round_values`."""
    if element.bits < 8:
        codes, _ = _nearest(element, ties, values.device)
        return codes.index_select(0, _cells(values, element)).view(values.shape)
    _check_even(element, ties)
    if element.dtype is not None:
        return values.clamp(-element.maximum, element.maximum).to(element.dtype)
    # Adding the smallest normal to a subnormal lines its mantissa up with the field of a normal one.
    rounded = round_values(values, element)
    subnormal = rounded < element.smallest_normal
    bits = torch.where(subnormal, rounded + element.smallest_normal, rounded).view(torch.int32)
    lowest = (_E8M0_BIAS - element.bias) << element.mantissa_bits
    codes = (bits >> (_FLOAT32_MANTISSA - element.mantissa_bits)).sub_(lowest)
    return codes.sub_(subnormal.to(torch.int32) << element.mantissa_bits).to(torch.uint8)


def decode(codes: Tensor, element: MiniFloat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes as `encode` gives them, in dtype: each is rounded once to it, where it does not hold it."""
    if codes.device.type != "cpu" and element.dtype is not None:
        return codes.view(element.dtype).to(dtype)
    flat = codes.reshape(-1).view(torch.uint8)
    aligned = flat.is_contiguous() and flat.numel() % 2 == 0 and flat.storage_offset() % 2 == 0
    if element.bits == 8 and aligned and dtype.itemsize in _WIDE:
        # One look-up for two codes: several times as fast as torch's own cast.
        index = flat.view(torch.uint16).to(torch.int32)
        return _pairs(element, dtype, codes.device).index_select(0, index).view(dtype).view(codes.shape)
    return _levels(element, dtype, codes.device).index_select(0, flat.to(torch.int32)).view(codes.shape)


def levels(element: MiniFloat) -> Tensor:
    """The value of every code, float32 [2**bits] on the CPU."""
    codes = torch.arange(1 << element.bits, dtype=torch.int32, device="cpu")
    if element.dtype is not None:
        return codes.to(torch.uint8).view(element.dtype).float()
    mantissa = (codes & ((1 << element.mantissa_bits) - 1)).float() * 2.0**-element.mantissa_bits
    exponent = (codes >> element.mantissa_bits) & ((1 << element.exponent_bits) - 1)
    subnormal = exponent == 0
    value = torch.where(subnormal, mantissa, 1 + mantissa)
    value = torch.ldexp(value, torch.where(subnormal, 1, exponent) - element.bias)
    return torch.where((codes & element.sign_bit) != 0, -value, value)


# Packing


def pack_fp4(codes: Tensor) -> Tensor:
    """4-bit codes [..., K] uint8 as bytes [..., K/2], even columns in the low nibble. K must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(
            f"4-bit codes of {codes.shape[-1]} columns do not fill whole bytes; pad them to an even number"
        )
    return codes[..., 1::2].bitwise_left_shift(4).bitwise_or_(codes[..., 0::2])


def unpack_fp4(packed: Tensor) -> Tensor:
    """Codes [..., K] uint8 of bytes [..., K/2]; the inverse of `pack_fp4`."""
    data = packed.view(torch.uint8)
    return torch.stack((data & 0xF, data >> 4), -1).flatten(-2)


def decode_fp4(packed: Tensor, dtype: torch.dtype = torch.float32, element: MiniFloat = E2M1) -> Tensor:
    """Values [..., K] of packed 4-bit codes [..., K/2], in one look-up a byte. dtype: of 16 or 32 bits."""
    index = packed.reshape(-1).view(torch.uint8).to(torch.int32)
    values = _pairs(element, dtype, packed.device).index_select(0, index).view(dtype)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_fp6(codes: Tensor) -> Tensor:
    """6-bit codes [..., K] uint8 as bytes [..., 3K/4]: four codes in three bytes, the first in the lowest bits.

    K must be a multiple of 4.
    """
    if codes.shape[-1] % 4:
        raise ValueError(
            f"6-bit codes of {codes.shape[-1]} columns do not fill whole bytes; pad them to a multiple of 4"
        )
    a, b, c, d = (codes[..., first::4] for first in range(4))
    return torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(-2)


def unpack_fp6(packed: Tensor) -> Tensor:
    """Codes [..., K] uint8 of bytes [..., 3K/4]; the inverse of `pack_fp6`."""
    a, b, c = (packed[..., first::3] for first in range(3))
    codes = (a & 0x3F, ((b << 2) | (a >> 6)) & 0x3F, ((c << 4) | (b >> 4)) & 0x3F, c >> 2)
    return torch.stack(codes, -1).flatten(-2)


# Power-of-two scales


def e8m0_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2**(code - 127) of scale bytes, uint8 or float8_e8m0fnu of any shape; 255 is NaN."""
    index = codes.reshape(-1).view(torch.uint8).to(torch.int32)
    return _powers(dtype, codes.device).index_select(0, index).view(codes.shape)


def e8m0_codes(amax: Tensor, element: MiniFloat, rule: str, zero: int = 0) -> Tensor:
    """Scale bytes, uint8, for blocks whose largest magnitude is amax (float, any shape).

    rule: "floor" and "ceil" round log2(amax) and take the element's largest exponent off; "floor_log2" and "ceil_log2"
    the same by way of a logarithm in amax's dtype, as some writers have it. "even" is floor after
    rounding amax to the element's mantissa, "even_fp4" to that of E2M1 whatever the element is. "round_up" is the least
    power of two by which amax fits, ceil(log2(amax / maximum)), from the bits; "rceil" the same by way of a float32
    logarithm, as several writers have it. zero: the byte of a block of zeros. NaN and inf give 255.
    """
    codes = _exponents(amax if rule in _BY_LOGARITHM else amax.float(), element, rule).clamp_(0, E8M0_NAN - 1)
    codes = codes.masked_fill_(amax == 0, zero).masked_fill_(~amax.isfinite(), E8M0_NAN)
    return codes.to(torch.uint8)


def power_of_two_above(scale: Tensor) -> Tensor:
    """The bits of float32 scales, rounded up to a power of two: a biased exponent, int32, for positive finite ones."""
    return (scale.view(torch.int32) + ((1 << _FLOAT32_MANTISSA) - 1)) >> _FLOAT32_MANTISSA


def e4m3_scale(scale: Tensor, floor: float = 0.0) -> Tensor:
    """Block scales, non-negative floats, as float8_e4m3fn, saturated at 448 and no less than floor."""
    return scale.clamp(floor, E4M3.maximum).to(torch.float8_e4m3fn)


def _exponents(amax: Tensor, element: MiniFloat, rule: str) -> Tensor:
    """Biased exponents, int32; what amax is not positive and finite is mended by the caller."""
    if rule in _BY_LOGARITHM:
        exponents = torch.nan_to_num(_BY_LOGARITHM[rule](torch.log2(amax)), 0.0, 0.0, -_E8M0_BIAS)
        return exponents.int().add_(_E8M0_BIAS - element.largest_exponent)
    if rule == "round_up":
        return power_of_two_above(amax / element.maximum)
    if rule == "rceil":
        return torch.nan_to_num(torch.log2(amax / element.maximum).ceil_(), 0.0, 0.0, -_E8M0_BIAS).int() + _E8M0_BIAS
    bumps = {
        "floor": 0,
        "ceil": (1 << _FLOAT32_MANTISSA) - 1,
        "even": 1 << (_FLOAT32_MANTISSA - element.mantissa_bits - 1),
        "even_fp4": 1 << (_FLOAT32_MANTISSA - E2M1.mantissa_bits - 1),
    }
    if rule not in bumps:
        raise ValueError(f"{rule!r:.40} is no rule for E8M0 scales; one of {', '.join(E8M0_RULES)}")
    return ((amax.view(torch.int32) + bumps[rule]) >> _FLOAT32_MANTISSA).sub_(element.largest_exponent)


def _check_even(element: MiniFloat, ties: str) -> None:
    if ties != "even":
        raise ValueError(f"{element.name} rounds ties to even only, not {ties!r:.40}")


def _halves(element: MiniFloat) -> float:
    """Halves of the finest step between levels, in one: every level and every boundary is a whole number of them."""
    return 2 * 2.0**element.mantissa_bits / element.smallest_normal


def _cells(values: Tensor, element: MiniFloat) -> Tensor:
    """Which entry of `_nearest` each value belongs to, int32, flat."""
    farthest = element.maximum * _halves(element)
    halves = (values.reshape(-1).float() * _halves(element)).clamp_(-farthest, farthest)
    # Twice the value where it is whole, and the odd number between its neighbours where it is not.
    cells = (halves.floor() + halves.ceil_()).to(torch.int32)
    return cells.add_(2 * int(farthest)).clamp_(0, 4 * int(farthest))


@cached_tensors
def _nearest(element: MiniFloat, ties: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Code (uint8) and level (float32) of every boundary, level, and open interval between two of them."""
    if ties not in TIES:
        raise ValueError(f"ties {ties!r:.40} is none of {', '.join(TIES)}")
    farthest = int(element.maximum * _halves(element))
    values = torch.arange(-2 * farthest, 2 * farthest + 1).double() / 2 / _halves(element)
    positive = levels(element)[: 1 << (element.bits - 1)].double()
    above = torch.searchsorted(positive, values.abs())
    below = (above - 1).clamp_(min=0)
    rest = (positive[above] - values.abs()) - (values.abs() - positive[below])  # of the way up, less of the way down
    on_tie = {"even": above % 2 == 0, "away": torch.ones_like(above).bool(), "zero": torch.zeros_like(above).bool()}
    codes = torch.where((rest < 0) | ((rest == 0) & on_tie[ties]), above, below)
    codes = torch.where(values.abs() == positive[above], above, codes)
    codes = codes + element.sign_bit * (values < 0)
    return codes.to(device, torch.uint8), levels(element)[codes].to(device)


@cached_tensors
def _powers(dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.arange(256, dtype=torch.int32) << _FLOAT32_MANTISSA
    bits[0], bits[E8M0_NAN] = 1 << (_FLOAT32_MANTISSA - 1), 0x7FC00000
    return bits.view(torch.float32).to(device, dtype)


@cached_tensors
def _levels(element: MiniFloat, dtype: torch.dtype, device: torch.device) -> Tensor:
    return levels(element).to(device, dtype)


@cached_tensors
def _pairs(element: MiniFloat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two values in one integer for every two codes that lie side by side: in one byte, or in two."""
    table, count = levels(element).to(dtype), 1 << element.bits
    low, high = table.repeat(count), table.repeat_interleave(count)
    return torch.stack((low, high), -1).view(_WIDE[dtype.itemsize]).flatten().to(device)
