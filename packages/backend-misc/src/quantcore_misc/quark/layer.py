"""How a layer of Quark rounds what reaches and leaves it, and under which names it stores that and its weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.sdk import Activation, RoundedLayer, TensorSpec, WeightFormat, dtype_name, float_dtype
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
class QuarkLayer(RoundedLayer):
    """The part that is the same whatever the weight is. Subclasses store and read that.

    dtype: of the model, in which scales are chosen. scale_dtype, input_dtype, output_dtype: in which float scales are
    stored. names: pairs of a tensor's name and the other one that
    it is stored under. seconds: dtypes of second scales, by name, where they are not float32.
    """

    stores_every_zero: ClassVar[bool] = True

    dtype: str = "bfloat16"
    scale_dtype: str = "bfloat16"
    input_dtype: str = "bfloat16"
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

    def side_spec(self, side: str, role: str) -> TensorSpec:
        if role == "zero":
            return TensorSpec(self.name_of(f"{side}_zero_point"), torch.int8, ())
        if role == "outer":
            return TensorSpec(SECONDS[side], float_dtype(self.second_dtype(side), SECONDS[side]), ())
        dtype = float_dtype(self.input_dtype if side == "input" else self.output_dtype, f"{side}_dtype")
        return TensorSpec(self.name_of(f"{side}_scale"), dtype, ())

    def second_dtype(self, side: str) -> str:
        """Of the second scale of the "weight", "input" or "output"."""
        return dict(self.seconds).get(SECONDS[side], "float32")

    def name_of(self, name: str) -> str:
        """The name that a tensor is stored under."""
        return dict(self.names).get(name, name)

    def range_tensors(self, side: str, low: Tensor, high: Tensor, least: float = 0.0) -> dict[str, Tensor]:
        """What is stored of activations between low and high, 0-dimensional; a static scale is at least `least`."""
        activation = self.activation(side)
        assert activation is not None
        low, high = low.to(float_dtype(self.dtype, "dtype")), high.to(float_dtype(self.dtype, "dtype"))
        if activation.outer is not None:
            spec = self.side_spec(side, "outer")
            return {spec.name: outer_scale(torch.maximum(low.abs(), high.abs())).to(spec.dtype)}
        scale, zero = range_scale(low, high, activation)
        found = {"scale": scale.clamp(min=least), "zero": zero}
        return {spec.name: found[role].to(spec.dtype) for role, spec in self.side_specs(side).items() if role in found}


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
