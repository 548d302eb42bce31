"""How torchao stores one weight: int8, float8 and integers of 1 to 8 bits in bytes, and packed int4.

A parameter `weight` of a tensor subclass is stored as its parts, `_weight_qdata`, `_weight_scale` and so on. Source:
torchao 0.18, quantization/quantize_/workflows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quantcore.sdk import (
    FLOAT_DTYPES,
    Activation,
    Codes,
    Float,
    Integer,
    Parts,
    QuantizedInput,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    Zero,
    blocks,
    dtype_name,
    float_dtype,
    int8_product,
    row_chunks,
    transforms,
)
from quantcore_misc.torchao.rounding import EPSILON, FLOAT8

if TYPE_CHECKING:
    from typing_extensions import Self

CODES, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
PRE_SCALE = "_weight_act_pre_scale"
INPUT_SCALE, INPUT_ZERO = "_weight_act_quant_scale", "_weight_act_quant_zero_point"
Block = tuple[int, int]


@dataclass(frozen=True)
class TorchAoWeight(Scaled):
    """A scaled grid under torchao's names. weight_dtype: of the weight as the model sees it, which files say, too."""

    scales_in_weight_dtype: ClassVar[bool] = False

    weight_dtype: str = "bfloat16"

    @property
    def own_dtype(self) -> torch.dtype:
        return float_dtype(self.weight_dtype, "weight_dtype")

    def measured(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """What is stored of the layer's input, whose least and largest number are these; {} where nothing is."""
        return {}

    @property
    def code_bits(self) -> float:
        return self.element.bits

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format of what is stored: with zero points or without, and with a scale of the input's columns."""
        scale = tensors.get(self.scale.name)
        found = self
        if self.scales_in_weight_dtype and scale is not None and scale.dtype in FLOAT_DTYPES.values():
            found = self.with_scales(dtype_name(scale.dtype))
        if self.zero is not None and not self.zero.in_values and CODES in tensors and self.zero.name not in tensors:
            found = dataclasses.replace(found, zero=None)  # of a symmetric weight
        divisor = tensors.get(PRE_SCALE)
        if divisor is not None and divisor.is_floating_point():
            spelled = tuple(-1 if size == shape[-1] else size for size in divisor.shape)
            columns = transforms.ColumnScale(PRE_SCALE, dtype_name(divisor.dtype), spelled)
            found = dataclasses.replace(found, transform=columns)
        return found

    def with_scales(self, dtype: str) -> Self:
        """The same for scales of this dtype, which is the weight's."""
        changes: dict[str, Any] = {"weight_dtype": dtype, "scale": dataclasses.replace(self.scale, dtype=dtype)}
        if self.zero is not None and self.zero.in_values:
            changes["zero"] = dataclasses.replace(self.zero, dtype=dtype)
        return dataclasses.replace(self, **changes)

    def rounded(self, weight: Tensor, factor: Tensor, zero: Tensor | None) -> Tensor:
        """The codes [N, K] of round(weight * factor) + zero, each step in the dtype of weight and factors."""
        block, low, high = self.sides(weight.shape), self.element.low, self.element.high
        codes = torch.empty(weight.shape, dtype=self.element.dtype, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            part = weight[rows].to(factor.dtype, copy=True)
            blocks.each_block_(Tensor.mul_, part, factor, block, rows).round_()
            if zero is not None:
                blocks.each_block_(Tensor.add_, part, zero, block, rows)
            codes[rows] = part.clamp_(low, high).to(codes.dtype)
        return codes


@dataclass(frozen=True)
class Int8Weight(TorchAoWeight):
    """(code - zero) * scale in float32, rounded once. half_range: codes are those of 7 bits.

    Where the input is rounded, codes are multiplied by codes in integers. input_rank: the dimensions of the one scale
    of the input where one is stored, each of size 1.
    """

    half_range: bool = False
    input_rank: int = 2

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format of what is stored, which tells whether the input is rounded under a scale of the file."""
        scale, found = tensors.get(INPUT_SCALE), self
        if scale is not None and self.input is not None:
            rounding = dataclasses.replace(self.input, strategy="tensor", is_static=True)
            found = dataclasses.replace(self, input=rounding, input_rank=scale.ndim)
        return super(Int8Weight, found).read(tensors, shape)

    def side_spec(self, side: str, role: str) -> TensorSpec:
        name, dtype = (INPUT_ZERO, torch.int8) if role == "zero" else (INPUT_SCALE, torch.float32)
        return TensorSpec(name, dtype, (1,) * self.input_rank)

    def stored_rounding(
        self, side: str, dtype: torch.dtype, operands: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As for every layer; with a dimension, for a number without one would be cast to the input's dtype."""
        scale, zero, outer = super().stored_rounding(side, dtype, operands)
        return None if scale is None else scale.reshape(1), None if zero is None else zero.reshape(1), outer

    def measured(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        if self.input is None or not self.input.is_static:
            return {}
        found = dict(zip(("scale", "zero"), self.input.scales(torch.stack((low, high))), strict=True))
        named = {spec: found[role] for role, spec in self.side_specs("input").items()}
        return {spec.name: number.reshape(spec.shape) for spec, number in named.items() if number is not None}

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes under the largest magnitude of a block over 127.5, taken in the weight's dtype."""
        steps = 63.5 if self.half_range else 127.5
        limit = blocks.block_abs_max(weight, self.sides(weight.shape)) / steps
        scale = limit.clamp_(min=EPSILON).float()
        codes = self.encode(weight, scale.reciprocal(), reciprocal=True)
        return Parts(codes.clamp_(-64, 63) if self.half_range else codes, self.scale.encode(scale))

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        if self.input is None:
            return super().linear(x, operands, bias, shape)
        rows = x.reshape(-1, shape[1])
        scale = operands[self.scale.name].reshape(-1)
        y = self._sums(self.quantize_input(rows, operands), operands[CODES], x.dtype).float() * scale
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], shape[0])

    @staticmethod
    def _sums(inputs: QuantizedInput, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The products of codes [M, N] under the scales of the input, in dtype."""
        scale = inputs.scale.reshape(-1, 1)
        y = (int8_product.int8_matmul(inputs.codes, codes).float() * scale).to(dtype)
        if inputs.zero is None:
            return y
        shift = inputs.zero.reshape(-1, 1) * scale
        return y - (shift * codes.sum(1, dtype=torch.int64)).to(dtype)


@dataclass(frozen=True)
class Float8Weight(TorchAoWeight):
    """code * scale in float32, rounded once."""

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes that bring the largest magnitude of a block to the largest number; zeros stay zeros."""
        limit = blocks.block_abs_max(weight, self.sides(weight.shape)) / self.element.high
        scale = limit.float().masked_fill_(limit == 0, 1.0)
        return Parts(self.encode(weight, scale), self.scale.encode(scale))

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format of the float8 that is stored, which headers do not tell."""
        codes = tensors.get(CODES)
        stored = "" if codes is None else dtype_name(codes.dtype)
        if stored not in FLOAT8:
            return super().read(tensors, shape)
        layout = dataclasses.replace(self.layout, dtype=stored)
        found = dataclasses.replace(self, element=Float(FLOAT8[stored]), layout=layout)
        return super(Float8Weight, found).read(tensors, shape)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        super().check_shape(shape)
        for name, size in zip(("out_features", "in_features"), shape, strict=True):
            if self.input is not None and size % 16:
                raise ValueError(
                    f"{name} {size} is not a multiple of 16, as products of float8 by float8 need; skip this layer"
                )

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Codes times codes, summed in float32, under both scales, plus the bias; rounded once."""
        if self.input is None:
            return super().linear(x, operands, bias, shape)
        inputs = self.input.dequantize(self.quantize_input(x, operands), torch.float32)
        return self.product(inputs, operands, None if bias is None else bias.float(), shape, torch.float32).to(x.dtype)


@dataclass(frozen=True)
class IntxWeight(TorchAoWeight):
    """(code - zero) * scale, each step rounded to the weight's dtype; once where scales have another dtype.

    mapping: "symmetric" or "symmetric_no_clipping_err", about 0, or "asymmetric". algorithm: "affine", or
    "hqq_scale_only" for symmetric scales by least squares. least: of scales, 0 for the smallest normal number.
    """

    scales_in_weight_dtype: ClassVar[bool] = True

    mapping: str = "symmetric"
    algorithm: str = "affine"
    least: float = 0.0

    @property
    def has_own_scales(self) -> bool:
        """Whether scales have another dtype than the weight."""
        return self.scale.dtype != self.weight_dtype

    def round_weight(self, weight: Tensor) -> Parts:
        weight = weight.to(self.own_dtype)
        codes, scale, zero = self._chosen(weight)
        if scale.dtype != self.scale.torch_dtype:  # codes follow the scales that are stored
            scale = scale.to(self.scale.torch_dtype)
            wide = torch.promote_types(weight.dtype, scale.dtype)
            codes = self.rounded(weight, scale.reciprocal().to(wide), zero)
        return Parts(codes, scale, None if zero is None else zero.to(self.element.dtype))

    def _chosen(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points, these as floats, all in the dtype of the weight."""
        if self.algorithm == "hqq_scale_only":
            from quantcore_misc.torchao.solver import fit_scales

            ends = int(self.element.low), int(self.element.high)
            return *fit_scales(weight, self.sides(weight.shape)[1], *ends), None
        low, high = blocks.block_ends(weight, self.sides(weight.shape))
        scale = self._scales(low, high).clamp_(min=self.least or torch.finfo(weight.dtype).smallest_normal)
        zero = None
        if self.mapping == "asymmetric":
            zero = (self.element.low - (low / scale).round_()).clamp_(self.element.low, self.element.high)
        return self.rounded(weight, scale.reciprocal(), zero), scale, zero

    def _scales(self, low: Tensor, high: Tensor) -> Tensor:
        first, last = self.element.low, self.element.high
        if self.mapping == "asymmetric":
            return (high - low) / float(last - first)
        if self.mapping == "symmetric" or last == 0:
            return torch.maximum(-low, high) / (float(last - first) / 2)
        return torch.maximum(low / float(first), high / float(last))

    def with_scales(self, dtype: str) -> Self:
        return self if self.has_own_scales and dtype == self.scale.dtype else super().with_scales(dtype)

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        """As for every format, and codes that are no integers of so many bits."""
        faults, codes = super().value_faults(tensors, shape), tensors[self.layout.name]
        if self.layout.packing != "single" or codes.is_meta or codes.numel() == 0:
            return faults
        least, most = (int(end) for end in codes.aminmax())
        if least >= self.element.low and most <= self.element.high:
            return faults
        return [*faults, f"{self.layout.name}: holds {least} to {most}, and {self.element.bits} bits are configured"]


@dataclass(frozen=True)
class Int4Weight(TorchAoWeight):
    """code * scale + zero, each step rounded to the weight's dtype; codes from -8 to 7, two a byte."""

    scales_in_weight_dtype: ClassVar[bool] = True

    def round_weight(self, weight: Tensor) -> Parts:
        """The nearest codes between the ends of a group, in float32."""
        grouped = weight.unflatten(1, (-1, self.sides(weight.shape)[1]))
        low, high = (end.float() for end in torch.aminmax(grouped, dim=-1))
        scale = (high - low).clamp_(min=1e-6) / 15
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in row_chunks(tuple(weight.shape)):
            steps = (grouped[rows].float() - low[rows, :, None]) / scale[rows, :, None]
            codes[rows] = (steps.round_().clamp_(0, 15) - 8).to(torch.int8).flatten(1)
        return Parts(codes, self.scale.encode(scale), (low + 8 * scale).to(self.scale.torch_dtype))


# Formats by what config and headers say of them; block: rows and columns that share a scale, 0 for all.


def int8_format(
    block: Block, dtype: str, rounding: Activation | None = None, *, half_range: bool = False
) -> Int8Weight:
    """Bytes under float32 scales."""
    return Int8Weight(
        Integer(8),
        block,
        Codes(CODES, "int8"),
        Scale(SCALE, "float32"),
        Zero(ZERO, "int8"),
        weight_dtype=dtype,
        half_range=half_range,
        input=rounding,
    )


def float8_format(block: Block, dtype: str, stored: str, rounding: Activation | None = None) -> Float8Weight:
    """Floats of 8 bits, stored as this dtype, under float32 scales."""
    return Float8Weight(
        Float(FLOAT8[stored]),
        block,
        Codes(CODES, stored),
        Scale(SCALE, "float32"),
        weight_dtype=dtype,
        input=rounding,
    )


def intx_format(
    bits: int, block: Block, dtype: str, rounding: Activation | None = None, scales: str = "", **choices: Any
) -> IntxWeight:
    """Integers of so many bits, a byte each, under scales of a dtype, "" for the weight's.

    choices: the fields by which `IntxWeight` chooses numbers.
    """
    return IntxWeight(
        Integer(bits),
        block,
        Codes(CODES, "int8"),
        Scale(SCALE, scales or dtype),
        Zero(ZERO, "int8"),
        math="stored" if scales in ("", dtype) else "float32",
        weight_dtype=dtype,
        input=rounding,
        **choices,
    )


def int4_format(group_size: int, dtype: str) -> Int4Weight:
    """The packing format "plain"."""
    return Int4Weight(
        Integer(4),
        (1, group_size),
        Codes(CODES, "int8", "stream"),
        Scale(SCALE, dtype, transposed=True),
        Zero(ZERO, dtype, transposed=True, in_values=True),
        math="stored",
        weight_dtype=dtype,
    )


def int4_words_format(group_size: int, dtype: str) -> IntxWeight:
    """The packing format "plain_int32", of XPUs: eight codes from 0 to 15 a word, under integer zero points."""
    return IntxWeight(
        Integer(4, is_signed=False),
        (1, group_size),
        Codes(CODES, "int32", "stream"),
        Scale(SCALE, dtype, transposed=True),
        Zero(ZERO, "int8", transposed=True),
        math="stored",
        weight_dtype=dtype,
        mapping="asymmetric",
        least=1e-6,
    )


def codes_of(weight_format: WeightFormat) -> str | None:
    """Which 8-bit codes a weight is stored as, "int8" or "float8" in E4M3, under one scale or one for each row."""
    if not isinstance(weight_format, Int8Weight | Float8Weight) or weight_format.block not in ((0, 0), (1, 0)):
        return None
    if isinstance(weight_format, Int8Weight):
        return "int8"
    return "float8" if weight_format.element == Float("e4m3") else None
