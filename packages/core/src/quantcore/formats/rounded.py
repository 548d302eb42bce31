"""Layers that round what reaches and leaves them: the part that is the same whatever their weight is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quantcore.formats.activation import Activation, QuantizedInput
from quantcore.formats.base import TensorSpec, WeightFormat

SIDES = ("input", "output")
_SUFFIXES = {"scale": "scale", "zero": "zero_point", "outer": "global_scale"}
_DTYPES = {"scale": torch.float32, "zero": torch.int8, "outer": torch.float32}


@dataclass(frozen=True)
class RoundedLayer(WeightFormat):
    """A format whose layer rounds its input and its output, each as its `Activation` says, None for not at all.

    What is stored for that has a role: "scale" and "zero" of static activations, "outer" the scale above the others.
    Subclasses say how the weight is stored, and override `side_spec` where names, dtypes or shapes are others.
    """

    activations: ClassVar[tuple[str, ...]] = SIDES
    stores_every_zero: ClassVar[bool] = False  # zeros of symmetric integers are stored too

    input: Activation | None = field(default=None, kw_only=True)
    output: Activation | None = field(default=None, kw_only=True)

    def side_spec(self, side: str, role: str) -> TensorSpec:
        """What is stored in a role for the "input" or "output"."""
        return TensorSpec(f"{side}_{_SUFFIXES[role]}", _DTYPES[role], (1,))

    def activation(self, side: str) -> Activation | None:
        """How the layer's "input" or "output" is rounded."""
        return self.input if side == "input" else self.output

    def side_specs(self, side: str) -> dict[str, TensorSpec]:
        """By role what is stored for the rounding of a side."""
        activation = self.activation(side)
        if activation is None:
            return {}
        has_zero = not activation.is_symmetric or (self.stores_every_zero and activation.integer_bits is not None)
        stored = {"outer": activation.outer is not None, "scale": activation.is_static}
        stored["zero"] = activation.is_static and has_zero
        return {role: self.side_spec(side, role) for role, is_stored in stored.items() if is_stored}

    def activation_specs(self, *sides: str) -> tuple[TensorSpec, ...]:
        """What is stored for the rounding of these sides, of both where none is given."""
        return tuple(spec for side in sides or SIDES for spec in self.side_specs(side).values())

    def unmeasured(self, device: torch.device) -> dict[str, Tensor]:
        """What is stored of activations before calibration measures them: scales of 1, zeros of 0."""
        return {
            spec.name: torch.full(spec.shape, float(role != "zero"), dtype=spec.dtype, device=device)
            for side in SIDES
            for role, spec in self.side_specs(side).items()
        }

    def unrounded(self, device: torch.device) -> dict[str, Tensor]:
        """As `unmeasured` for layers that round nothing, {} for others, whose scales no family of weights knows."""
        return self.unmeasured(device) if self.input is None and self.output is None else {}

    def why_whole(self, along_n: bool) -> str:
        return "" if along_n or self.output is None else "the layer rounds its output, and sums must be complete before"

    def measures(self, side: str) -> bool:
        """Whether something of the range of the layer's "input" or "output" is stored."""
        activation = self.activation(side)
        return activation is not None and activation.is_measured

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        if self.input is None and self.output is None:
            return super().linear(x, operands, bias, shape)
        y = self.product(self.round_activation("input", x, operands), operands, bias, shape, x.dtype)
        return self.round_activation("output", y, operands)

    def round_activation(self, side: str, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
        activation = self.activation(side)
        return x if activation is None else activation.fake_quantize(x, *self.stored_rounding(side, x.dtype, operands))

    def quantize_input(self, x: Tensor, operands: Mapping[str, Tensor]) -> QuantizedInput:
        """Codes of the layer's input x [M, K], of which `round_activation` gives the values."""
        if self.input is None:
            raise ValueError(f"{self!r} rounds no input")
        return self.input.quantize(x, *self.stored_rounding("input", x.dtype, operands))

    def stored_rounding(
        self, side: str, dtype: torch.dtype, operands: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The stored scale, zero and outer scale of a side whose activations have this dtype."""
        activation, specs = self.activation(side), self.side_specs(side)
        scale, zero, outer = (operands[specs[role].name] if role in specs else None for role in _SUFFIXES)
        in_input = activation is not None and activation.code_math == "input"
        return scale.to(dtype) if scale is not None and in_input else scale, zero, outer
