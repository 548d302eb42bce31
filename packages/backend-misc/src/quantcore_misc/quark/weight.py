"""How one weight of Quark is stored: codes, scales and zero points, and how its layer rounds activations.

Source: the exports of AMD Quark 0.13; OCP Microscaling Formats 1.0 for scales of powers of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.formats.activation import Activation
from quantcore.formats.base import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore.formats.minifloat import e8m0_values
from quantcore_misc.quark.codes import Packing, pack_nibbles, packing_for, unpack_nibbles
from quantcore_misc.quark.scaling import (
    Parts,
    activation_scale,
    dequantize_codes,
    outer_scale,
    quantize_weight,
    unsigned_scales,
)

_SCALE_TENSORS = {"e8m0": torch.uint8, "e5m3": torch.uint8, "e4m3": torch.float8_e4m3fn}
_WORDS = ("int4", "uint4")
# Names of older exports, where scales stand in modules of their own.
_OTHER_NAMES = {
    "weight_scale": "weight_quantizer.scale",
    "weight_zero_point": "weight_quantizer.zero_point",
    "input_scale": "input_quantizer.scale",
    "input_zero_point": "input_quantizer.zero_point",
    "output_scale": "output_quantizer.scale",
    "output_zero_point": "output_quantizer.zero_point",
}


@dataclass(frozen=True)
class QuarkWeight(WeightFormat):
    """w = (code - zero) * scale in float32, rounded once.

    element, strategy, group_size, is_symmetric, scale, mode: as in `TensorQuant`. is_reordered: the order of codes in a
    word. dtype: of the model, in which scales are chosen. scale_dtype, input_dtype, output_dtype: in which float
    scales are stored. input, output: how the layer rounds activations. in_modules: scales have the names of older
    exports.
    """

    element: str = "e4m3"
    strategy: str = "tensor"
    group_size: int = 0
    is_symmetric: bool = True
    scale: str = "float"
    mode: str = "even"
    is_reordered: bool = True
    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    input: Activation | None = None
    input_dtype: str = "bfloat16"
    output: Activation | None = None
    output_dtype: str = "bfloat16"
    in_modules: bool = False

    # Storage

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        N, K = shape
        specs = [TensorSpec("weight", self.packing.dtype, self.packing.shape(N, K))]
        scale = _SCALE_TENSORS.get(self.scale) or float_dtype(self.scale_dtype, "scale_dtype")
        specs.append(TensorSpec(self._name("weight_scale"), scale, self._grid(shape)))
        if self.has_zero:
            specs.append(self._zero_spec(shape))
        if self.scale == "e4m3":
            specs.append(TensorSpec("weight_scale_2", torch.float32, ()))
        return (*specs, *self._activation_specs("input"), *self._activation_specs("output"))

    def check_shape(self, shape: tuple[int, ...]) -> None:
        for name, size, multiple in zip(("out_features", "in_features"), shape, self.packing.multiples, strict=True):
            if size % multiple:
                raise ValueError(
                    f"{name} {size} is not a multiple of {multiple}, as {self.element} by {self.strategy} needs; "
                    "add the layer to exclude"
                )
        if self.group_size and shape[1] % self.group_size:
            raise ValueError(
                f"in_features {shape[1]} is not a multiple of group_size {self.group_size}; use another, or add the "
                "layer to exclude"
            )

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales of the weight; stored scales of activations are 1 until calibration measures them."""
        parts = quantize_weight(weight.to(float_dtype(self.dtype, "dtype")), self)
        ones = {
            spec.name: (torch.zeros if "zero_point" in spec.name else torch.ones)(
                spec.shape, dtype=spec.dtype, device=weight.device
            )
            for side in ("input", "output")
            for spec in self._activation_specs(side)
        }
        return {**self.store(parts), **ones}

    def store(self, parts: Parts) -> dict[str, Tensor]:
        """The stored tensors of a weight's own parts."""
        scale = parts.scale.t().contiguous() if self._is_transposed else parts.scale
        if self.scale == "float":
            scale = scale.to(float_dtype(self.scale_dtype, "scale_dtype"))
        shape = tuple(parts.codes.shape)
        tensors = {
            "weight": self.packing.pack(parts.codes),
            self._name("weight_scale"): scale.reshape(self._grid(shape)),
        }
        if self.has_zero:
            tensors[self._name("weight_zero_point")] = self._pack_zero(parts.zero, shape)
        if parts.outer is not None:
            tensors["weight_scale_2"] = parts.outer
        return tensors

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        codes = self.packing.unpack(tensors["weight"], shape[0], shape[1])
        zero = self._unpack_zero(tensors, shape) if self.has_zero else None
        return dequantize_codes(codes, self._scales(tensors), zero, self, dtype or float_dtype(self.dtype, "dtype"))

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        weight = tensors.get("weight")
        if weight is None or weight.ndim != 2:
            return None
        return self.packing.size(weight.shape[0], weight.shape[1])

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the names and float dtypes of stored tensors."""
        in_modules = any(name in tensors for name in _OTHER_NAMES.values())
        found = dataclasses.replace(self, in_modules=in_modules)
        fields = {"scale_dtype": "weight_scale", "input_dtype": "input_scale", "output_dtype": "output_scale"}
        stored = {field: tensors.get(found._name(name)) for field, name in fields.items()}
        floats = {field: dtype_name(t.dtype) for field, t in stored.items() if t is not None and _is_float(t)}
        return dataclasses.replace(found, **floats)  # type: ignore[arg-type]

    # The layer

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rounded = self._round(self.input, x, operands, "input")
        weight = self.dequantize(operands, shape, x.dtype)
        y = torch.nn.functional.linear(rounded, weight, None if bias is None else bias.to(x.dtype))
        return self._round(self.output, y, operands, "output")

    def _round(self, activation: Activation | None, x: Tensor, operands: Mapping[str, Tensor], side: str) -> Tensor:
        if activation is None:
            return x
        scale, zero = (operands.get(self._name(f"{side}_{kind}")) for kind in ("scale", "zero_point"))
        if scale is not None and activation.code_math == "input":
            scale = scale.to(x.dtype)
        return activation.fake_quantize(x, scale, zero, operands.get(f"{side}_scale_2"))

    def measures(self, side: str) -> bool:
        """Whether something of the range of the layer's "input" or "output" is stored."""
        activation = self.input if side == "input" else self.output
        return activation is not None and (activation.is_static or activation.outer is not None)

    def activation_tensors(self, side: str, amax: Tensor, least: float = 0.0) -> dict[str, Tensor]:
        """What is stored of activations up to amax (0-dimensional); a static scale is at least `least`."""
        activation = self.input if side == "input" else self.output
        assert activation is not None
        if activation.outer is not None:
            return {f"{side}_scale_2": outer_scale(amax)}
        low, high = activation.code_range
        scale = activation_scale(amax, (high - low) / 2, float_dtype(self.dtype, "dtype")).clamp_(min=least)
        dtype = self.input_dtype if side == "input" else self.output_dtype
        return {self._name(f"{side}_scale"): scale.to(float_dtype(dtype, f"{side}_dtype"))}

    def _activation_specs(self, side: str) -> list[TensorSpec]:
        activation = self.input if side == "input" else self.output
        if activation is None:
            return []
        specs = []
        if activation.is_static:
            dtype = float_dtype(self.input_dtype if side == "input" else self.output_dtype, f"{side}_dtype")
            specs.append(TensorSpec(self._name(f"{side}_scale"), dtype, ()))
            if activation.integer_bits is not None:
                specs.append(TensorSpec(self._name(f"{side}_zero_point"), torch.int8, ()))
        if activation.outer is not None:
            specs.append(TensorSpec(f"{side}_scale_2", torch.float32, ()))
        return specs

    # Parts of the storage

    @property
    def packing(self) -> Packing:
        """How codes are stored."""
        return packing_for(self.element, self.strategy != "group", self.is_reordered)

    @property
    def has_zero(self) -> bool:
        """Integers are stored with zero points, symmetric ones too."""
        return "int" in self.element

    @property
    def _is_transposed(self) -> bool:
        """Whether scales and zero points of groups are stored [K/G, N], as words along N are."""
        return self.element in _WORDS and self.strategy == "group"

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of scales."""
        if self.strategy != "group":
            return () if self.strategy == "tensor" else (shape[0],)
        groups = shape[1] // self.group_size
        return (groups, shape[0]) if self._is_transposed else (shape[0], groups)

    def _scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Scales in float32: 0-dimensional, [N, 1], or [N, G]."""
        stored = tensors[self._name("weight_scale")]
        if self.scale == "float":
            scale = stored.float()
        else:
            scale = e8m0_values(stored) if self.scale == "e8m0" else unsigned_scales(stored, self.scale)
        if self.scale == "e4m3":
            scale = scale * tensors["weight_scale_2"]
        if self.strategy == "channel":
            return scale[:, None]
        return scale.t() if self._is_transposed else scale

    def _zero_spec(self, shape: tuple[int, ...]) -> TensorSpec:
        name, grid = self._name("weight_zero_point"), self._grid(shape)
        if self.element not in _WORDS:
            return TensorSpec(name, self.packing.dtype, grid)
        return TensorSpec(name, torch.int32, (*grid[:-1], grid[-1] // 8) if grid else (1,))

    def _pack_zero(self, zero: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zero points, shaped as scales are in memory, as they are stored."""
        if self.element not in _WORDS:
            return zero.reshape(self._grid(shape))
        rows = zero.t() if self._is_transposed else zero.reshape(1, -1)
        packed = pack_nibbles(rows.contiguous(), self.is_reordered)
        return packed if self._is_transposed else packed[0]

    def _unpack_zero(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Zero points as numbers, shaped as `_scales`; the inverse of `_pack_zero`."""
        stored = tensors[self._name("weight_zero_point")]
        if self.element not in _WORDS:
            return stored[:, None] if self.strategy == "channel" else stored
        rows = stored if self._is_transposed else stored.view(1, -1)
        zero = unpack_nibbles(rows, self._grid(shape)[-1] if self._grid(shape) else 1, self.element, self.is_reordered)
        return zero.t()

    def _name(self, name: str) -> str:
        return _OTHER_NAMES.get(name, name) if self.in_modules else name


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
