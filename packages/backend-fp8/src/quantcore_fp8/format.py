"""How one weight of small floats is stored, with scales for blocks, rows or the tensor, and its layer.

Source: DeepSeek-V3 (arXiv:2412.19437), section 3.3; OCP Microscaling Formats (MX) v1.0; the checkpoint layouts of
transformers, DeepSeek, vLLM and FBGEMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantcore.sdk import (
    Activation,
    Codes,
    Element,
    Float,
    Number,
    Parts,
    Scale,
    Scaled,
    TensorSpec,
    WeightFormat,
    blocks,
    dtype_name,
    float_dtype,
    linear_rows,
    minifloat,
)
from quantcore_fp8.matmul import linear_codes
from quantcore_fp8.names import CACHE_SCALE_NAMES, INPUT_SCALE_NAMES, SCALE_NAMES
from quantcore_fp8.writers import WRITERS

WHOLE = 0  # as a side of a block: all rows, or all columns
TENSOR, ROW = (WHOLE, WHOLE), (1, WHOLE)
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")

ROW_INPUT = Activation("e4m3", "token", zero_scale=1.0)
STATIC_INPUT = Activation("e4m3", "tensor", is_static=True)


@dataclass(frozen=True)
class Fp8(Scaled):
    """E4M3 codes [N, K], or E2M1 (`fp4_expert`); a value is code * scale in float32, rounded once.

    writer: whose rule chooses scales ("transformers", "deepgemm", "fbgemm"). power_of_two: round them up to one.
    input_scale: where a static scale of the input is stored. bias_first: add the bias before the result is rounded.
    carried: name and dtype of scalars that a file stores with the layer for the cache of keys and values. dtype: of the
    weight that was quantized.
    """

    element: Element = Float("e4m3")
    block: blocks.Block = (128, 128)
    layout: Codes = Codes(dtype="float8_e4m3fn")
    scale: Scale = Scale("weight_scale_inv")
    fills_blocks: bool = False
    writer: str = "transformers"
    power_of_two: bool = False
    input_scale: Number = Number("activation_scale")
    bias_first: bool = False
    carried: tuple[tuple[str, str], ...] = ()
    dtype: str = "bfloat16"

    @property
    def is_static(self) -> bool:
        """Whether a scale of the input is stored."""
        return self.input is not None and self.input.is_static

    @property
    def own_dtype(self) -> torch.dtype:
        return float_dtype(self.dtype, "dtype")

    @property
    def cache_scales(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.carried)

    def side_spec(self, side: str, role: str) -> TensorSpec:
        return self.input_scale.spec()

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        carried = (TensorSpec(name, getattr(torch, dtype), (), metadata=True) for name, dtype in self.carried)
        return (*super().tensor_specs(shape), *carried)

    def round_weight(self, weight: Tensor) -> Parts:
        """By the rule of the writer. Codes of less than 8 bits have no negative zero, as DeepGEMM's cast."""
        amax = blocks.block_abs_max(weight, self.sides(weight.shape))
        factor, scale = WRITERS[self.writer](amax, self.power_of_two, float(self.element.high))
        codes = self.encode(weight, factor, reciprocal=True)
        if self.element.bits < 8:
            codes.masked_fill_(codes == 1 << (self.element.bits - 1), 0)
        return Parts(codes, self.scale.encode(scale))

    def with_input_range(self, tensors: Mapping[str, Tensor], amax: Tensor) -> dict[str, Tensor]:
        """Stored tensors with the static input scale that covers magnitudes up to amax; nothing seen gives 1."""
        old = tensors[self.input_scale.name]
        scale = torch.where(amax > 0, amax.float() / minifloat.E4M3.maximum, 1.0)
        return {**tensors, self.input_scale.name: scale.to(old.device, old.dtype).reshape(old.shape)}

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """y = rounded(x) @ W.T in float32, rounded once to x's dtype; then the bias, or before where bias_first."""
        early, late = (bias, None) if self.bias_first else (None, bias)
        y = self._product(x, operands, early, shape)
        return y if late is None else y.add_(late)

    def _product(
        self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        rounding = self.input
        # An emulation multiplies values in x's dtype; of powers of two the same values are exact in bfloat16.
        if rounding is None or rounding.code_math == "input" or self._is_exact(x.dtype):
            return super().linear(x, operands, bias, shape)
        quantized = self.quantize_input(x, operands)
        if self.block in (TENSOR, ROW) and rounding.strategy != "group":
            scale = self.tables(operands, shape)[0].flatten()
            return linear_codes(quantized, operands[self.layout.name], scale, bias, x.dtype)
        inputs = rounding.dequantize(quantized, torch.float32)

        def weight_of(part: slice) -> Tensor:
            rows = torch.arange(part.start, part.stop, device=x.device)
            return self.dequantize_rows(operands, shape, rows, torch.float32)

        return linear_rows(inputs, weight_of, shape, bias, x.dtype)

    def _is_exact(self, dtype: torch.dtype) -> bool:
        """Whether rounded inputs and weights, small floats times powers of two, are exact in a dtype."""
        scales_input = self.input is not None and self.input.scale.startswith("e8m0")
        return dtype == torch.bfloat16 and scales_input and self.scale.kind_name == "e8m0"

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The variant that a file holds: names, dtypes and ranks of scales, and what shares one, by their shapes."""
        if self.element.bits == 8 and "weight" in tensors and tensors["weight"].dtype == torch.int8:
            return fp4_expert(self.input, self.dtype).read(tensors, shape)
        found = next((name for name in SCALE_NAMES if name in tensors), None)
        if found is None:
            return self
        changes: dict[str, Any] = {"scale": _as_stored(self.scale, found, tensors[found])}
        block = self._block_of(tensors[found], shape)
        if block != self.block:
            changes["block"] = block
            if self.input is not None and not self.is_static:
                changes["input"] = ROW_INPUT
        given = next((name for name in INPUT_SCALE_NAMES if name in tensors), None)
        if self.is_static and given is not None:
            changes["input_scale"] = _as_stored(self.input_scale, given, tensors[given])
        return self.replace(**changes, carried=_carried(tensors))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is not None and weight.dtype == torch.int8 and self.element.bits == 8:
            return fp4_expert().stored_shape(tensors)
        return None if weight is None or weight.ndim < 2 else super().stored_shape(tensors) or tuple(weight.shape)

    def _block_of(self, scale: Tensor, shape: tuple[int, ...]) -> blocks.Block:
        if self.block != TENSOR and tuple(scale.shape) == self.grid(shape):
            return self.block
        if scale.ndim <= 2 and scale.numel() == 1:
            return TENSOR
        return ROW if tuple(scale.shape) in ((shape[0],), (shape[0], 1)) else self.block


def fp4_expert(rounding: Activation | None = None, dtype: str = "bfloat16") -> Fp8:
    """How one routed expert of DeepSeek-V4 is stored: E2M1 codes, a power of two for each 32 columns of a row.

    Quantizing takes ties toward zero, as DeepGEMM's cast does.
    """
    return Fp8(
        Float("e2m1", ties="zero"),
        (1, 32),
        Codes(dtype="int8", packing="stream"),
        Scale("weight_scale_inv", "float8_e8m0fnu"),
        fills_blocks=True,
        writer="deepgemm",
        power_of_two=True,
        input=rounding,
        dtype=dtype,
    )


def _as_stored(description: Any, name: str, tensor: Tensor) -> Any:
    """A stored scale as a file has it; an impossible dtype is left to the check against specs."""
    found = dtype_name(tensor.dtype)
    known = found if found in SCALE_DTYPES else description.dtype
    return replace(description, name=name, dtype=known, rank=min(2, tensor.ndim))


def _carried(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    dtypes = {name: dtype_name(tensors[name].dtype) for name in CACHE_SCALE_NAMES if name in tensors}
    return tuple((name, dtype) for name, dtype in dtypes.items() if dtype in SCALE_DTYPES)
