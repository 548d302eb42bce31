"""How a layer rounds its input before it multiplies: the element, what shares a scale, and how the scale is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcore.formats.base import Description, float_dtype
from quantcore.formats.minifloat import (
    E8M0_RULES,
    MINIFLOATS,
    MiniFloat,
    decode,
    e8m0_codes,
    e8m0_values,
    encode,
    minifloat,
    round_values,
)

INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
STRATEGIES = ("tensor", "token", "group")
QUOTIENTS = ("divide", "multiply", "reciprocal")
_SCALES = ("input", "float32", "bfloat16", "float16", "e4m3", "e5m3", *(f"e8m0-{rule}" for rule in E8M0_RULES))
_OUTER = (None, "divide", "multiply")
_PIECE = 1 << 18  # elements that are rounded together: a few copies of them fit a core's cache
_MASKS = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}  # all bits but the sign, by the bytes of a float


@dataclass(frozen=True)
class QuantizedInput:
    """codes: as x, int8, float8, or uint8 with one code of fewer bits in each byte. scale, zero: what they share.

    Shapes of scale and zero for x [..., K]: [] by tensor, [..., 1] by token, [..., ceil(K/G)] by group. A scale is a
    multiplier, float; zero is in code units and None for symmetric codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True, repr=False)
class Activation(Description):
    """The rounding of a layer's input. A value is (code - zero) * scale.

    element: "int2" to "int8", or the name of a minifloat. strategy: what shares a scale: the "tensor", a "token" (the
    last dimension), or a "group" of group_size columns; the last group may be short. is_static: scale (and zero) are
    stored with the layer.

    scale: what a scale is rounded to: a float dtype, "input" (the dtype of x), "e8m0-<rule>" (rules of `e8m0_codes`),
    or the minifloats "e4m3" and "e5m3". outer: None, or whether a scale per tensor, stored with the layer, is to
    "divide" or to "multiply" the others. limit: what the largest magnitude of a group is scaled to; None: the maximum
    of a minifloat, half the range of an integer. floor, ceiling: bounds of that magnitude, taken in the input's dtype
    where bounds_in_input. zero_scale: what a scale of zero becomes; None: eps of its dtype.

    quotient: how x becomes codes: x / scale ("divide"), x * (1 / scale) ("multiply"), or x * r where r = limit / amax
    and the scale is 1 / r ("reciprocal"). scale_math, code_math: the dtype of that arithmetic, "float32" or "input".
    """

    element: str = "int8"
    strategy: str = "token"
    group_size: int = 0
    is_static: bool = False
    is_symmetric: bool = True
    scale: str = "float32"
    outer: str | None = None
    limit: float | None = None
    floor: float = 0.0
    ceiling: float | None = None
    bounds_in_input: bool = False
    zero_scale: float | None = None
    quotient: str = "divide"
    scale_math: str = "float32"
    code_math: str = "float32"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {
            "element": (*INTEGERS, *MINIFLOATS),
            "strategy": STRATEGIES,
            "scale": _SCALES,
            "outer": _OUTER,
            "quotient": QUOTIENTS,
            "scale_math": ("float32", "input"),
            "code_math": ("float32", "input"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                spelled = ", ".join(map(str, allowed))
                raise ValueError(f"Activation.{name} must be one of {spelled}, got {getattr(self, name)!r:.60}")
        if (self.strategy == "group") != (self.group_size > 0):
            raise ValueError(f"Activation.group_size is {self.group_size} for strategy {self.strategy!r}")
        if not self.is_symmetric and self.integer_bits is None:
            raise ValueError(f"Activation.is_symmetric is false, but {self.element} has no zero point")

    @property
    def integer_bits(self) -> int | None:
        """Bits of an integer element, None for a minifloat."""
        return INTEGERS.get(self.element)

    @property
    def rows_apart(self) -> bool:
        """Whether each row is rounded as it would be alone, by nothing that is stored."""
        return self.strategy != "tensor" and not self.is_measured

    @property
    def is_measured(self) -> bool:
        """Whether something of the range of activations is stored with the layer."""
        return self.is_static or self.outer is not None

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.integer_bits or self.minifloat.bits

    @property
    def minifloat(self) -> MiniFloat:
        return minifloat(self.element)

    @property
    def code_range(self) -> tuple[float, float]:
        """The smallest and the largest code, as values."""
        bits = self.integer_bits
        if bits is None:
            return -self.minifloat.maximum, self.minifloat.maximum
        return -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)

    def scales(self, x: Tensor, outer: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The scale and zero that x [..., K] itself gives; shapes as in `QuantizedInput`.

        outer: the stored scale per tensor, for scales of E4M3. A group that holds NaN gets a scale of NaN.
        """
        if self.is_symmetric:
            return self._symmetric(x, outer)[0], None
        dtype = self._dtype(self.scale_math, x.dtype)
        low, high = (bound.to(dtype) for bound in self._grouped(x).aminmax(dim=-1))
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low) / float((1 << (self.integer_bits or 0)) - 1)
        smallest, largest = self.code_range
        zero = (smallest - low / scale).clamp_(smallest, largest).round_().nan_to_num_(0.0).to(torch.int8)
        return self._shaped(self._stored(scale, x.dtype)), self._shaped(zero)

    def quantize(
        self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, outer: Tensor | None = None
    ) -> QuantizedInput:
        """Codes of x [..., K] float, with stored scale and zero or, without them, those of x.

        Ties round to even; what is out of range saturates. Raises ValueError when a static activation gets no scale.
        """
        scale, zero, factor = self._resolve(x, scale, zero, outer)
        codes = torch.empty(x.shape, dtype=self._code_dtype, device=x.device)
        for part, of, part_factor, part_zero in self._pieces(x, codes, factor, zero):
            of.copy_(self._encode(self._steps(part, part_factor, part_zero)))
        return QuantizedInput(codes, scale, zero)

    def dequantize(self, quantized: QuantizedInput, dtype: torch.dtype, outer: Tensor | None = None) -> Tensor:
        """Values [..., K] of codes in dtype. The product is taken in code_math, where "input" means dtype."""
        values = torch.empty(quantized.codes.shape, dtype=dtype, device=quantized.codes.device)
        scale = self._whole(quantized.scale, outer)
        for codes, of, part_scale, part_zero in self._pieces(quantized.codes, values, scale, quantized.zero):
            of.copy_(self._values(self._decode(codes), part_scale, part_zero, dtype))
        return values

    def fake_quantize(
        self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, outer: Tensor | None = None
    ) -> Tensor:
        """What the codes of x stand for, in x's dtype: `dequantize` of `quantize`, without the codes."""
        scale, zero, factor = self._resolve(x, scale, zero, outer)
        values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        whole = self._whole(scale, outer)
        for part, of, part_factor, part_scale, part_zero in self._pieces(x, values, factor, whole, zero):
            codes = self._round(self._steps(part, part_factor, part_zero))
            of.copy_(self._values(codes, part_scale, part_zero, x.dtype))
        return values

    # Scales

    def _resolve(
        self, x: Tensor, scale: Tensor | None, zero: Tensor | None, outer: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scale, zero, and what x is divided or multiplied by."""
        if scale is None:
            if self.is_static:
                raise ValueError("the activation is static, so it needs the layer's stored scale; none was given")
            if self.is_symmetric:
                scale, factor = self._symmetric(x, outer)
                return scale, None, factor
            scale, zero = self.scales(x, outer)
        if self.strategy == "tensor":
            scale, zero = scale.reshape(()), None if zero is None else zero.reshape(())
        return scale, zero, self._factor(scale, outer)

    def _symmetric(self, x: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scale of x, and what x is divided or multiplied by."""
        amax = abs_max(self._grouped(x))
        amax = self._bounded(amax) if self.bounds_in_input else amax
        amax = amax.to(self._dtype(self.scale_math, x.dtype))
        amax = self._shaped(amax if self.bounds_in_input else self._bounded(amax))
        if self.quotient == "reciprocal":
            factor = self._limit / amax
            factor.masked_fill_(factor.isinf(), 1.0)
            return factor.reciprocal(), factor
        if self.scale.startswith("e8m0"):
            scale = e8m0_values(e8m0_codes(amax, self.minifloat, self.scale.removeprefix("e8m0-")))
        else:
            scale = self._stored(self._under_outer(amax / self._limit, outer), x.dtype)
        return scale, self._factor(scale, outer)

    def _bounded(self, amax: Tensor) -> Tensor:
        return amax if self.floor == 0.0 and self.ceiling is None else amax.clamp(self.floor, self.ceiling)

    def _under_outer(self, scale: Tensor, outer: Tensor | None) -> Tensor:
        if outer is None:
            return scale
        return scale.float() * outer.float() if self.outer == "divide" else scale.float() / outer.float()

    def _stored(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales rounded to what holds them, zeros replaced."""
        if self.scale in MINIFLOATS:
            element = minifloat(self.scale)
            scale, eps = round_values(scale, element), 2.0**-element.mantissa_bits
        else:
            scale = scale.to(dtype if self.scale == "input" else float_dtype(self.scale, "scale"))
            eps = torch.finfo(scale.dtype).eps
        return scale.masked_fill(scale == 0, eps if self.zero_scale is None else self.zero_scale)

    def _whole(self, scale: Tensor, outer: Tensor | None) -> Tensor:
        """What a code is multiplied by: the scale, with the outer one."""
        if outer is None:
            return scale
        return scale.float() / outer.float() if self.outer == "divide" else scale.float() * outer.float()

    def _factor(self, scale: Tensor, outer: Tensor | None) -> Tensor:
        whole = self._whole(scale, outer)
        return whole if self.quotient == "divide" else whole.float().reciprocal()

    @property
    def _limit(self) -> float:
        low, high = self.code_range
        return self.limit if self.limit is not None else (high - low) / 2

    # Codes

    def _steps(self, x: Tensor, factor: Tensor, zero: Tensor | None) -> Tensor:
        """x in units of its scale, shifted by its zero, before rounding."""
        dtype = self._dtype(self.code_math, x.dtype)
        steps = x.to(dtype) / factor.to(dtype) if self.quotient == "divide" else x.to(dtype) * factor.to(dtype)
        return steps if zero is None else steps.add_(zero)

    def _round(self, steps: Tensor) -> Tensor:
        """Codes as floats."""
        if self.integer_bits is None:
            return round_values(steps, self.minifloat)
        return steps.clamp_(*self.code_range).round_()

    def _encode(self, steps: Tensor) -> Tensor:
        return encode(steps, self.minifloat) if self.integer_bits is None else self._round(steps)

    def _decode(self, codes: Tensor) -> Tensor:
        return decode(codes, self.minifloat) if self.integer_bits is None else codes

    def _values(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        math = self._dtype(self.code_math, dtype)
        codes = codes.to(math)
        return (codes if zero is None else codes - zero) * scale.to(math)

    @property
    def _code_dtype(self) -> torch.dtype:
        return torch.int8 if self.integer_bits is not None else self.minifloat.dtype or torch.uint8

    @staticmethod
    def _dtype(math: str, dtype: torch.dtype) -> torch.dtype:
        return dtype if math == "input" else torch.float32

    # Groups

    def _grouped(self, x: Tensor) -> Tensor:
        """x with what shares a scale as its last dimension; a short last group is filled with zeros."""
        if self.strategy == "tensor":
            return x.reshape(-1)
        if self.strategy == "token":
            return x
        missing = -x.shape[-1] % self.group_size
        padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
        grouped: Tensor = padded.unflatten(-1, (-1, self.group_size))
        return grouped

    def _shaped(self, of_group: Tensor) -> Tensor:
        return of_group.unsqueeze(-1) if self.strategy == "token" else of_group

    def _pieces(self, x: Tensor, out: Tensor, *shared: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Views of x and out [rows, groups, G] that fit a cache, with what each group shares, [rows, groups, 1].

        out is contiguous. A short last group comes by itself.
        """
        if out.numel() == 0:
            return
        columns = x.shape[-1]
        size = self.group_size or columns
        whole = columns // size * size
        tables = [None if one is None else one.expand(*x.shape[:-1], -(-columns // size)) for one in shared]
        flat = [None if one is None else one.reshape(-1, one.shape[-1], 1) for one in tables]
        matrices = x.reshape(-1, columns), out.view(-1, columns)
        rows = max(1, _PIECE // max(1, columns))
        for start in range(0, matrices[0].shape[0], rows):
            cut = slice(start, start + rows)
            parts = [None if one is None else one[cut] for one in flat]
            if whole:
                yield (
                    *(matrix[cut, :whole].unflatten(1, (-1, size)) for matrix in matrices),
                    *(None if one is None else one[:, : whole // size] for one in parts),
                )
            if whole < columns:
                yield (
                    *(matrix[cut, whole:].unsqueeze(1) for matrix in matrices),
                    *(None if one is None else one[:, whole // size :] for one in parts),
                )


def abs_max(x: Tensor, dim: int = -1) -> Tensor:
    """The largest magnitude along a dimension, in x's dtype; NaN where there is one, 0 where there is nothing."""
    if x.shape[dim] == 0:
        return x.sum(dim)
    integer, mask = _MASKS.get(x.itemsize, (None, 0))
    if integer is None:
        return x.abs().amax(dim)
    # Without its sign a float is ordered as its bits are, and NaN is largest.
    largest: Tensor = x.view(integer).bitwise_and(mask).amax(dim)
    return largest.view(x.dtype)
