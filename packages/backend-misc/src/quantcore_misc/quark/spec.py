"""One spec of a Quark config: what a tensor is rounded to, and what shares a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcore.formats.activation import Activation

# Quark's names of elements, and ours; floats of 16 bits and more leave a tensor as it is.
_ELEMENTS = {
    "fp8_e4m3": "e4m3",
    "fp8_e5m2": "e5m2",
    "fp6_e2m3": "e2m3",
    "fp6_e3m2": "e3m2",
    "fp4": "e2m1",
    "int8": "int8",
    "uint8": "uint8",
    "int4": "int4",
    "uint4": "uint4",
}
_FLOATS = ("bfloat16", "float16", "float32")
_STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group"}
_MODES = ("even", "floor", "ceil")
_ZERO_SCALE = 2.0**-23


@dataclass(frozen=True)
class TensorQuant:
    """element: our name of it. strategy: what shares a scale: the tensor, a channel, a group of group_size columns.

    scale: what scales are: "float", "e8m0" (by the rounding mode), "e5m3", or "e4m3" under a second scale.
    """

    element: str
    strategy: str
    group_size: int
    is_dynamic: bool
    is_symmetric: bool
    scale: str
    mode: str = "even"

    @classmethod
    def parse(cls, values: Any, label: str) -> TensorQuant | None:
        """A spec, or a list of two: of the tensor and of its scales. None for null, and for floats.

        Raises TypeError or ValueError naming the key.
        """
        second = None
        if isinstance(values, list):
            if len(values) > 2 or not values:
                raise ValueError(f"{label}: a list holds one spec, or two: of the tensor and of its scales")
            values, second = values[0], (values[1] if len(values) == 2 else None)
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise TypeError(f"{label} must be a spec, a list of specs or null, got {values!r:.80}")
        dtype = values.get("dtype")
        if dtype in _FLOATS:
            return None
        scheme, size = values.get("qscheme") or "per_tensor", values.get("group_size")
        _check(dtype, _ELEMENTS, f"{label}.dtype")
        _check(scheme, _STRATEGIES, f"{label}.qscheme")
        if scheme == "per_group" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{label}.group_size must be a positive integer, got {size!r:.80}")
        mode = values.get("scale_calculation_mode") or "even"
        _check(mode, _MODES, f"{label}.scale_calculation_mode")
        return cls(
            element=_ELEMENTS[dtype],
            strategy=_STRATEGIES[scheme],
            group_size=size if scheme == "per_group" and size is not None else 0,
            is_dynamic=bool(values.get("is_dynamic")),
            is_symmetric=values.get("symmetric") is not False,
            scale=_scale_of(values, second),
            mode=mode,
        )

    def activation(self) -> Activation:
        """The rounding of a layer's input or output. Scales per channel are meant, and taken, per token.

        Raises ValueError for an unsigned element, which has no activation here.
        """
        from quantcore.formats.activation import Activation

        if self.element.startswith("uint"):
            raise ValueError(f"activations in {self.element} are not supported; use int8 or a float")
        shared: dict[str, Any] = {
            "element": self.element,
            "strategy": "token" if self.strategy == "channel" else self.strategy,
            "group_size": self.group_size,
            "is_symmetric": self.is_symmetric,
            "zero_scale": _ZERO_SCALE,
        }
        if self.scale == "e8m0":
            return Activation(**shared, scale=f"e8m0-{self.mode}")
        if self.scale != "float":
            outer = "multiply" if self.scale == "e4m3" else None
            return Activation(**shared, scale=self.scale, outer=outer)
        is_static = not self.is_dynamic
        if self.element.startswith("int"):
            return Activation(**shared, is_static=is_static)
        return Activation(**shared, is_static=is_static, scale="input", scale_math="input", code_math="input")


@dataclass(frozen=True)
class LayerSpec:
    """What of a layer is rounded, each None where it is not."""

    weight: TensorQuant | None
    input: TensorQuant | None
    output: TensorQuant | None

    @classmethod
    def parse(cls, values: Any, label: str) -> LayerSpec:
        """The specs of a dict as `global_quant_config`. Raises TypeError or ValueError naming the key."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{label} must be a dict of specs, got {values!r:.80}")
        if values.get("bias") is not None:
            raise ValueError(f"{label}.bias: quantized biases are not read; export the model with bias null")
        parts = ("weight", "input_tensors", "output_tensors")
        return cls(*(TensorQuant.parse(values.get(part), f"{label}.{part}") for part in parts))


def _scale_of(values: Mapping[str, Any], second: Any) -> str:
    if second is not None:
        return "e4m3"
    written = str(values.get("scale_format") or values.get("scale_type") or "float")
    if "e8m0" in written:
        return "e8m0"
    return "e5m3" if "e5m3" in written else "float"


def _check(value: Any, choices: Mapping[str, Any] | tuple[str, ...], label: str) -> None:
    if value not in choices:
        raise ValueError(f"{label} must be one of {', '.join(choices)}, got {value!r:.80}")
