"""How one weight of E4M3 codes is stored, with scales for blocks, rows or the tensor, and its layer.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3; OCP Microscaling Formats (MX) v1.0; the checkpoint layouts of
transformers, DeepSeek, vLLM and FBGEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore.formats.blocks import Block, block_abs_max, dequantize_blocks, grid, quantize_blocks, scale_rows_
from quantcore.formats.minifloat import E4M3, decode, e8m0_values
from quantcore.formats.pieces import linear_rows
from quantcore_fp8.format_fp4 import Fp4Expert
from quantcore_fp8.matmul import linear_codes
from quantcore_fp8.names import CACHE_SCALE_NAMES, INPUT_SCALE_NAMES, SCALE_NAMES
from quantcore_fp8.writers import WRITERS

WHOLE = 0  # as a side of a block: all rows, or all columns
TENSOR, ROW = (WHOLE, WHOLE), (1, WHOLE)
SCALE_DTYPES: dict[str, torch.dtype] = {
    dtype_name(dtype): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
}
EXPONENTS = ("float8_e8m0fnu", "uint8")  # scales that are bytes b for 2**(b - 127)

ROW_INPUT = Activation("e4m3", "token", zero_scale=1.0)
STATIC_INPUT = Activation("e4m3", "tensor", is_static=True)


@dataclass(frozen=True)
class Fp8(WeightFormat):
    """E4M3 codes [N, K]; a value is code * scale.

    block: rows and columns that share a scale, WHOLE for all. scale, scale_dtype, scale_rank: suffix, dtype and rank of
    the stored scales. writer: whose rule chooses scales ("transformers", "deepgemm", "fbgemm"). power_of_two: round
    them up to one. activation: how the layer rounds its input, None for not at all. input_scale, input_dtype,
    input_rank: where a static scale of that is stored. bias_first: add the bias before the result is rounded. carried:
    name and dtype of scalars that a file stores with the layer for the cache of keys and values. dtype: of the weight
    that was quantized.
    """

    activations: ClassVar[tuple[str, ...]] = ("activation",)

    block: Block = (128, 128)
    scale: str = "weight_scale_inv"
    scale_dtype: str = "float32"
    scale_rank: int = 2
    writer: str = "transformers"
    power_of_two: bool = False
    activation: Activation | None = None
    input_scale: str = "activation_scale"
    input_dtype: str = "float32"
    input_rank: int = 0
    bias_first: bool = False
    carried: tuple[tuple[str, str], ...] = ()
    dtype: str = "bfloat16"

    @property
    def is_static(self) -> bool:
        """Whether a scale of the input is stored."""
        return self.activation is not None and self.activation.is_static

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.carried)

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = self.block
        along_n, along_k = (0, rows) if rows else None, (1, columns) if columns else None
        specs = [
            TensorSpec("weight", torch.float8_e4m3fn, tuple(shape), along_n=(0, 1), along_k=(1, 1)),
            TensorSpec(
                self.scale, SCALE_DTYPES[self.scale_dtype], self._scale_shape(shape), along_n=along_n, along_k=along_k
            ),
        ]
        if self.is_static:
            specs.append(TensorSpec(self.input_scale, SCALE_DTYPES[self.input_dtype], (1,) * self.input_rank))
        carried = [TensorSpec(name, SCALE_DTYPES[dtype], (), metadata=True) for name, dtype in self.carried]
        return (*specs, *carried)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """As the format says; a static input scale is 1, until a calibration measures it (`with_input_range`)."""
        block = self.sides(weight.shape)
        factor, scale = WRITERS[self.writer](block_abs_max(weight, block), self.power_of_two)
        stored = self._store_scale(scale).view(self._scale_shape(tuple(weight.shape)))
        tensors = {"weight": quantize_blocks(weight, factor, block, E4M3), self.scale: stored}
        if self.is_static:
            shape = (1,) * self.input_rank
            tensors[self.input_scale] = torch.ones(shape, dtype=SCALE_DTYPES[self.input_dtype], device=weight.device)
        return tensors

    def with_input_range(self, tensors: Mapping[str, Tensor], amax: Tensor) -> dict[str, Tensor]:
        """Stored tensors with the static input scale that covers magnitudes up to amax; nothing seen gives 1."""
        old = tensors[self.input_scale]
        scale = torch.where(amax > 0, amax.float() / E4M3.maximum, 1.0)
        return {**tensors, self.input_scale: scale.to(old.device, old.dtype).reshape(old.shape)}

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or float_dtype(self.dtype, "dtype")
        return dequantize_blocks(tensors["weight"], self.scales(tensors, shape), self.sides(shape), E4M3, dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The rows that rows number, each with the scales of its own blocks; the rest of the weight is not read."""
        block_rows, block_columns = self.sides(shape)
        codes = tensors["weight"].view(torch.uint8).index_select(0, rows)
        scale = self.scales(tensors, shape).index_select(0, rows // block_rows)
        dtype = dtype or float_dtype(self.dtype, "dtype")
        return dequantize_blocks(codes, scale, (1, block_columns), E4M3, dtype)

    def reads_rows_alone(self, shape: tuple[int, ...]) -> bool:
        return True

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """y = rounded(x) @ W.T in float32, rounded once to x's dtype; then the bias, or before where bias_first."""
        early, late = (bias, None) if self.bias_first else (None, bias)
        y = self._product(x, operands, early, shape)
        return y if late is None else y.add_(late)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        if side == "output" or self.activation is None:
            return x
        return self.activation.fake_quantize(x, operands[self.input_scale] if self.is_static else None)

    def _product(
        self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        rounding = self.activation
        # An emulation multiplies values in x's dtype; of powers of two the same values are exact in bfloat16.
        if rounding is None or rounding.code_math == "input" or self._is_exact(x.dtype):
            return super().linear(self.round_activation("input", x, operands), operands, bias, shape)
        codes, scale, block = operands["weight"], self.scales(operands, shape), self.sides(shape)
        quantized = rounding.quantize(x, operands[self.input_scale] if self.is_static else None)
        if self.block in (TENSOR, ROW) and rounding.strategy != "group":
            return linear_codes(quantized, codes, scale.flatten(), bias, x.dtype)
        inputs = rounding.dequantize(quantized, torch.float32)
        return linear_rows(
            inputs, lambda rows: scale_rows_(decode(codes[rows], E4M3), scale, block, rows), shape, bias, x.dtype
        )

    def _is_exact(self, dtype: torch.dtype) -> bool:
        """Whether rounded inputs and weights, E4M3 times powers of two, are exact in a dtype."""
        scales_input = self.activation is not None and self.activation.scale.startswith("e8m0")
        return dtype == torch.bfloat16 and scales_input and self.scale_dtype in EXPONENTS

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The variant that a file holds: names, dtypes and ranks of scales, and what shares one, by their shapes."""
        if "weight" in tensors and tensors["weight"].dtype == torch.int8:
            return Fp4Expert(activation=self.activation, dtype=self.dtype).read(tensors, shape)
        found = next((name for name in SCALE_NAMES if name in tensors), None)
        if found is None:
            return self
        changes = _named(tensors, found, "scale", self.scale_dtype)
        block = self._block_of(tensors[found], shape)
        if block != self.block:
            changes["block"] = block
            if self.activation is not None and not self.activation.is_static:
                changes["activation"] = ROW_INPUT
        if self.is_static:
            given = next((name for name in INPUT_SCALE_NAMES if name in tensors), None)
            changes |= {} if given is None else _named(tensors, given, "input", self.input_dtype)
        return self.replace(**changes, carried=_carried(tensors))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        is_packed = weight is not None and weight.dtype == torch.int8
        return Fp4Expert().stored_shape(tensors) if is_packed else super().stored_shape(tensors)

    def sides(self, shape: tuple[int, ...] | torch.Size) -> Block:
        """Rows and columns of a block of a weight of this shape."""
        return self.block[0] or max(1, shape[0]), self.block[1] or max(1, shape[1])

    def scales(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The multiplier of each block, float32 [ceil(N/rows), ceil(K/columns)]."""
        stored = tensors[self.scale]
        values = e8m0_values(stored) if self.scale_dtype in EXPONENTS else stored.float()
        return values.view(grid(shape, self.sides(shape)))

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.block == TENSOR:
            return (1,) * self.scale_rank
        return (shape[0],) if self.block == ROW and self.scale_rank == 1 else grid(shape, self.sides(shape))

    def _block_of(self, scale: Tensor, shape: tuple[int, ...]) -> Block:
        if self.block != TENSOR and tuple(scale.shape) == grid(shape, self.sides(shape)):
            return self.block
        if scale.ndim <= 2 and scale.numel() == 1:
            return TENSOR
        return ROW if tuple(scale.shape) in ((shape[0],), (shape[0], 1)) else self.block

    def _store_scale(self, scale: Tensor) -> Tensor:
        if self.scale_dtype not in EXPONENTS:
            return scale.to(SCALE_DTYPES[self.scale_dtype])
        exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)  # of a power of two the bits above the mantissa
        return exponents.view(SCALE_DTYPES[self.scale_dtype])


def _named(tensors: Mapping[str, Tensor], name: str, field: str, dtype: str) -> dict[str, Any]:
    """The fields of a format that describe a stored scale; an impossible dtype is left to the check against specs."""
    found = dtype_name(tensors[name].dtype)
    known = found if found in SCALE_DTYPES else dtype
    label = "scale" if field == "scale" else "input_scale"
    return {label: name, f"{field}_dtype": known, f"{field}_rank": min(2, tensors[name].ndim)}


def _carried(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    dtypes = {name: dtype_name(tensors[name].dtype) for name in CACHE_SCALE_NAMES if name in tensors}
    return tuple((name, dtype) for name, dtype in dtypes.items() if dtype in SCALE_DTYPES)
