"""How a layer of Quark rounds what reaches and leaves it, and under which names it stores that and its weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.formats.base import TensorSpec, WeightFormat, dtype_name, float_dtype
from quantcore_misc.quark.scaling import outer_scale, range_scale

SIDES = ("input", "output")
SECONDS = {side: f"{side}_scale_2" for side in ("weight", *SIDES)}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Other names of stored tensors: scales in modules of their own (quark 0.11, with some options), and block scales as in
# the files of DeepSeek.
_OTHER_NAMES = {
    "weight_scale": ("weight_quantizer.scale", "weight_scale_inv"),
    "weight_zero_point": ("weight_quantizer.zero_point",),
    "input_scale": ("input_quantizer.scale",),
    "input_zero_point": ("input_quantizer.zero_point",),
    "output_scale": ("output_quantizer.scale",),
    "output_zero_point": ("output_quantizer.zero_point",),
}


@dataclass(frozen=True)
class QuarkLayer(WeightFormat):
    """The part that is the same whatever the weight is. Subclasses store and read that.

    dtype: of the model, in which scales are chosen. scale_dtype, input_dtype, output_dtype: in which float scales are
    stored. input, output: how the layer rounds its activations. names: pairs of a tensor's name and the other one that
    it is stored under. seconds: dtypes of second scales, by name, where they are not float32.
    """

    activations: ClassVar[tuple[str, ...]] = ("input", "output")

    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    input: Activation | None = None
    input_dtype: str = "bfloat16"
    output: Activation | None = None
    output_dtype: str = "bfloat16"
    names: tuple[tuple[str, str], ...] = ()
    seconds: tuple[tuple[str, str], ...] = ()

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        """The format with the names and float dtypes of stored tensors."""
        found = dataclasses.replace(self, names=tuple(_renamed(tensors)))
        fields = {"scale_dtype": "weight_scale", "input_dtype": "input_scale", "output_dtype": "output_scale"}
        stored = {field: tensors.get(found.name_of(name)) for field, name in fields.items()}
        floats = {field: dtype_name(t.dtype) for field, t in stored.items() if t is not None and t.dtype in _FLOATS}
        seconds = {name: tensors[name].dtype for name in SECONDS.values() if name in tensors}
        others = {name: dtype for name, dtype in seconds.items() if dtype in _FLOATS and dtype != torch.float32}
        floats["seconds"] = tuple((name, dtype_name(dtype)) for name, dtype in others.items())  # type: ignore[assignment]
        return dataclasses.replace(found, **floats)  # type: ignore[arg-type]

    def second_spec(self, side: str) -> TensorSpec:
        """The second scale of the "weight", "input" or "output"."""
        name = SECONDS[side]
        return TensorSpec(name, float_dtype(dict(self.seconds).get(name, "float32"), name), ())

    def name_of(self, name: str) -> str:
        """The name that a tensor is stored under."""
        return dict(self.names).get(name, name)

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rounded = self.round_activation("input", x, operands)
        y = self.product(rounded, operands, bias, shape, x.dtype)
        return self.round_activation("output", y, operands)

    def activation(self, side: str) -> Activation | None:
        """How the layer's "input" or "output" is rounded."""
        return self.input if side == "input" else self.output

    def measures(self, side: str) -> bool:
        """Whether something of the range of the layer's "input" or "output" is stored."""
        activation = self.activation(side)
        return activation is not None and activation.is_measured

    def range_tensors(self, side: str, low: Tensor, high: Tensor, least: float = 0.0) -> dict[str, Tensor]:
        """What is stored of activations between low and high, 0-dimensional; a static scale is at least `least`."""
        activation = self.activation(side)
        assert activation is not None
        low, high = low.to(float_dtype(self.dtype, "dtype")), high.to(float_dtype(self.dtype, "dtype"))
        if activation.outer is not None:
            spec = self.second_spec(side)
            return {spec.name: outer_scale(torch.maximum(low.abs(), high.abs())).to(spec.dtype)}
        scale, zero = range_scale(low, high, activation)
        found = {"scale": scale.clamp(min=least), "zero_point": zero}
        specs = {spec.name: spec for spec in self.activation_specs(side)}
        named = {self.name_of(f"{side}_{kind}"): tensor for kind, tensor in found.items()}
        return {name: tensor.to(specs[name].dtype) for name, tensor in named.items() if name in specs}

    def activation_specs(self, *sides: str) -> list[TensorSpec]:
        """What is stored for the rounding of these sides."""
        return [spec for side in sides for spec in self._specs_of(side)]

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        """Scales of activations that nothing was measured of: 1, with zero points of 0."""
        return {
            spec.name: torch.full(spec.shape, float("zero_point" not in spec.name), dtype=spec.dtype, device=device)
            for spec in self.activation_specs(*SIDES)
        }

    def _specs_of(self, side: str) -> list[TensorSpec]:
        activation, specs = self.activation(side), []
        if activation is not None and activation.is_static:
            dtype = float_dtype(self.input_dtype if side == "input" else self.output_dtype, f"{side}_dtype")
            specs.append(TensorSpec(self.name_of(f"{side}_scale"), dtype, ()))
            if activation.integer_bits is not None:
                specs.append(TensorSpec(self.name_of(f"{side}_zero_point"), torch.int8, ()))
        if activation is not None and activation.outer is not None:
            specs.append(self.second_spec(side))
        return specs

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        activation = self.activation(side)
        return x if activation is None else activation.fake_quantize(x, *self._stored(side, x.dtype, operands))

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        """Codes of the layer's input x [M, K], of which `round_activation` gives the values."""
        assert self.input is not None
        return self.input.quantize(x, *self._stored("input", x.dtype, operands))

    def _stored(
        self, side: str, dtype: torch.dtype, operands: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The scale, the zero and the second scale that are stored for a side whose activations are of dtype."""
        activation = self.activation(side)
        assert activation is not None
        scale, zero = (operands.get(self.name_of(f"{side}_{kind}")) for kind in ("scale", "zero_point"))
        return as_used(scale, activation, dtype), zero, operands.get(SECONDS[side])


def as_used(scale: Tensor | None, activation: Activation, dtype: torch.dtype) -> Tensor | None:
    """A stored scale as activations of dtype are rounded under it: floats in their own dtype, as all arithmetic."""
    return scale if scale is None or activation.code_math != "input" else scale.to(dtype)


def _renamed(stored: Iterable[str]) -> list[tuple[str, str]]:
    """Which tensors are stored under which other name."""
    stored = set(stored)
    return [
        (name, other)
        for name, others in _OTHER_NAMES.items()
        if name not in stored
        for other in others
        if other in stored
    ]
