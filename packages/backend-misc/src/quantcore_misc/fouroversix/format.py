"""How fouroversix stores one weight: codes and scales of whole tiles, the largest magnitude, and the shape.

Source: Cook et al. 2025, Four Over Six (arXiv:2512.02010), section 3; fouroversix 1.0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from quantcore.sdk import Codes, Integer, Outer, Parts, Scale, Scaled, TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_misc import tiles
from quantcore_misc.fouroversix.rules import NVFP4, Rounding, holds_integers

_VALUES, _SCALES = "quantized_weight_values", "quantized_weight_scale_factors"
_AMAX, _SHAPE = "quantized_weight_amax", "quantized_weight_metadata"
_UNDER_ZERO = 0xB  # the code that upstream leaves under an E8M0 scale of 0, by which it is 0
_INTS = {"int32": torch.int32, "int64": torch.int64}


@dataclass(frozen=True)
class FourOverSix(Scaled):
    """code * scale * amax / steps in float32, in this order, with steps of the rule by which it was rounded.

    rounding: of the weight; is_square: by blocks as high as wide. input_rounding: of the layer's input, None where it
    stays float. output_type: the float dtype that sums are rounded to, and the bias is added in. shape_type: the dtype
    of the stored shape. Kernels read scales row by row, without what fills up tiles; so do all functions of operands.
    """

    activations: ClassVar[tuple[str, ...]] = ("input_rounding",)

    rounding: Rounding = NVFP4
    is_square: bool = False
    input_rounding: Rounding | None = None
    output_type: str = "bfloat16"
    shape_type: str = "int32"

    @property
    def family(self) -> str | None:  # type: ignore[override]
        return None  # amax comes after the product of code and scale, which no family has

    # Rounding

    def round_weight(self, weight: Tensor) -> Parts:
        found = self.rounding.quantize(weight, self._down)
        scale = found.scale.view(torch.uint8).repeat_interleave(self._down, 0)[: weight.shape[0]]
        amax = found.amax if self.rounding.has_amax else torch.ones_like(found.amax)
        return Parts(self.element.from_bits(found.bits), scale.view(found.scale.dtype), None, amax)

    def factors(self, scale: Tensor, outer: Tensor | None = None) -> Tensor:
        """What codes are multiplied by first: the scale of their block, 0 for a byte of 0."""
        found = self.scale.decode(scale)
        return found if self.rounding.has_amax else found.masked_fill(scale.view(torch.uint8) == 0, 0.0)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values = super().dequantize(tensors, shape, torch.float32)
        return self.rounding.outermost(values, tensors[_AMAX]).to(dtype or self.own_dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        values = super().dequantize_rows(tensors, shape, rows, torch.float32)
        return self.rounding.outermost(values, tensors[_AMAX]).to(dtype or self.own_dtype)

    # The layer

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Rounded input times weight, summed in float32 and rounded to output_type, plus the bias in it."""
        rounding = self.input_rounding
        inputs = x.float() if rounding is None else rounding.fake_quantize(x)
        y = self.product(inputs, operands, None, shape, torch.float32)
        y = y.to(float_dtype(self.output_type, "output_type"))
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        rounding = self.input_rounding if side == "input" else None
        return x if rounding is None else rounding.fake_quantize(x).to(x.dtype)

    # The stored tensors

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        rows, columns = self._padded(shape)
        assert self.outer is not None
        return (
            TensorSpec(_VALUES, torch.uint8, (rows, columns // 2)),
            TensorSpec(_SCALES, self.scale.torch_dtype, (rows * columns // self.block[1],)),
            self.outer.spec(),
            TensorSpec(_SHAPE, _INTS[self.shape_type], (6,), metadata=True),
        )

    def operand_names(self, shape: tuple[int, ...]) -> tuple[str, ...]:
        return _VALUES, _SCALES, _AMAX

    def operands(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Codes [>= N, ceil(K/2)], bytes of scales [N, ceil(K/B)], amax."""
        values, (rows, columns) = tensors[_VALUES], shape
        across = -(-columns // 2)
        if values.shape[1] != across:
            values = values[:rows, :across].contiguous()
        grid = self.grid(shape)
        own = tiles.untile if self.rounding.grid.is_tiled else tiles.unpad
        return {_VALUES: values, _SCALES: own(tensors[_SCALES], *grid), _AMAX: tensors[_AMAX]}

    def parts(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Parts:
        return super().parts(self.operands(tensors, shape), shape)

    def store(self, parts: Parts) -> dict[str, Tensor]:
        codes, shape = parts.codes, tuple(parts.codes.shape)
        rows, columns = self._padded(shape)
        last = parts.scale.view(torch.uint8)[-1:].expand(-shape[0] % self._down, -1)  # of a block that is cut short
        scale = tiles.pad(torch.cat([parts.scale.view(torch.uint8), last]))
        bits = functional.pad(self.element.to_bits(codes), (0, columns - shape[1], 0, rows - shape[0]))
        if not self.rounding.has_amax:
            bits = torch.where((scale == 0).repeat_interleave(self.block[1], 1), _UNDER_ZERO, bits)
        described = [*shape, rows, columns, 1, int(self.rounding.grid.is_tiled)]
        assert parts.outer is not None
        assert self.outer is not None
        outer = self.outer.spec()
        return {
            _VALUES: self.layout.pack(self.element.from_bits(bits.to(torch.uint8)), self.element),
            _SCALES: (tiles.tile(scale) if self.rounding.grid.is_tiled else scale.flatten()).view(
                self.scale.torch_dtype
            ),
            _AMAX: parts.outer.to(outer.dtype).reshape(outer.shape),
            _SHAPE: torch.tensor(described, dtype=_INTS[self.shape_type], device=codes.device),
        }

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the dtypes that are stored. Raises ValueError for another shape or layout than stored."""
        amax, described = tensors.get(_AMAX), tensors.get(_SHAPE)
        changes: dict[str, object] = {}
        if amax is not None and amax.is_floating_point() and amax.ndim < 2:
            changes["outer"] = self._amax(dtype_name(amax.dtype), amax.ndim)
        if described is not None:
            changes["shape_type"] = "int64" if described.dtype == torch.int64 else "int32"
            if not described.is_meta:
                self._check_described(described, shape)
        return self.replace(**changes)

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        described = tensors.get(_SHAPE)
        return None if described is None or described.is_meta else tuple(described.tolist()[:2])

    def describe_shape(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
        described = [*shape, *self._padded(shape), 1, int(self.rounding.grid.is_tiled)]
        return {**tensors, _SHAPE: torch.tensor(described, dtype=tensors[_SHAPE].dtype, device="cpu")}

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Every shape is filled up to whole tiles."""

    def value_faults(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> list[str]:
        faults, scale = super().value_faults(tensors, shape), tensors[_SCALES]
        is_e4m3 = self.rounding.has_amax and not scale.is_meta
        count = int((scale.view(torch.uint8) & 0x7F).eq(0x7F).sum()) if is_e4m3 else 0
        return [*faults, *([f"{_SCALES}: {count} of {scale.numel()} values are NaN"] if count else [])]

    def _amax(self, dtype: str, rank: int) -> Outer:
        return Outer(_AMAX, dtype, rank, steps=self.rounding.steps)

    @property
    def _down(self) -> int:
        """Rows that share a scale."""
        return self.block[1] if self.is_square else 1

    def _padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = tiles.padded(*self.grid(shape))
        return rows, columns * self.block[1]

    def _check_described(self, described: Tensor, shape: tuple[int, ...]) -> None:
        expected = [*shape, *self._padded(shape), 1, int(self.rounding.grid.is_tiled)]
        if described.tolist() != expected:
            raise ValueError(
                f"{_SHAPE}: expected {expected} for a weight {list(shape)} of {self.rounding.dtype} (shape, shape in "
                f"whole tiles, whether packed, whether tiled), got {described.tolist()}"
            )


@dataclass(frozen=True)
class FloatsOrIntegers(FourOverSix):
    """Of each block the sign of the scale says whether its codes are floats or integers."""

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values, (rows, columns) = tensors[_VALUES], shape
        bits = functional.pad(
            self.layout.unpack(values[:rows], (rows, columns), self.element), (0, -columns % self.block[1])
        ).unflatten(1, (-1, self.block[1]))
        scale = self.scale.load(tensors[_SCALES], self.grid(shape)).unsqueeze(-1)
        factor = self.scale.decode(scale).abs()
        floats, integers = (self.rounding.products(bits, factor, each) for each in (self.element, Integer(4)))
        products = torch.where(holds_integers(scale), integers, floats).flatten(1)[:, :columns]
        return self.rounding.outermost(products, tensors[_AMAX]).to(dtype or self.own_dtype)

    def dequantize_rows(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], rows: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        few = (len(rows), shape[1])
        return self.dequantize({name: self._rows(name, tensors[name], rows) for name in tensors}, few, dtype)

    @staticmethod
    def _rows(name: str, operand: Tensor, rows: Tensor) -> Tensor:
        return operand if name == _AMAX else operand.view(torch.uint8)[rows].view(operand.dtype)

    @property
    def has_own_layout(self) -> bool:
        return True  # no `Codes` says what a code is


def weight_format(
    rounding: Rounding, *, is_square: bool, inputs: Rounding | None, output_type: str, float_type: str
) -> FourOverSix:
    """The format of a weight rounded so. float_type: the dtype of the weight's model."""
    cls = FloatsOrIntegers if rounding.dtype == "if4" else FourOverSix
    grid = rounding.grid
    return cls(
        grid.element,
        (1, grid.columns),
        Codes(_VALUES, "uint8", "stream"),
        Scale(_SCALES, grid.scale),
        outer=Outer(_AMAX, "float32" if rounding.has_amax else float_type, rank=1, steps=rounding.steps),
        fills_blocks=False,
        rounding=rounding,
        is_square=is_square,
        input_rounding=inputs,
        output_type=output_type,
    )
