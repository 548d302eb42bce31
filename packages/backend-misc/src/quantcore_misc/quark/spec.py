"""One spec of a Quark config: what a tensor is rounded to, and what shares a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantcore.sdk import check_limits, check_type

if TYPE_CHECKING:
    from quantcore.sdk import Activation

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
    "int3": "int3",
    "int2": "int2",
    "uint2": "uint2",
}
# Elements of which quark exports no codes, and strategies under which it exports none of others.
_EMULATED = ("int16", "uint16", "int32", "mx6", "mx9", "bfp16")
_NOT_EXPORTED = (("int3", "tensor"), ("int3", "group"), ("uint2", "tensor"))
_INTEGERS = tuple(element for element in _ELEMENTS if "int" in element)
_BELOW_8_BITS = ("e2m1", "e2m3", "e3m2")
_FLOATS = ("bfloat16", "float16", "float32")
_STRATEGIES = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_block": "block"}
_MODES = ("even", "floor", "ceil")
_ROUNDINGS = ("half_even", "round", "floor", "ceil", "dither")  # recorded by quark, whose exported codes are rounded
_SCALE_FORMATS = ("float", *_FLOATS, "e8m0", "e5m3", "float8_e8m0fnu", "float8_e5m3")
KEYS = (
    *("dtype", "qscheme", "ch_axis", "group_size", "block_size", "symmetric", "is_dynamic", "scale_type"),
    *("scale_format", "scale_calculation_mode", "round_method", "observer_cls", "mx_element_dtype", "zero_point_type"),
    *("is_scale_quant", "qat_spec", "mx_block_size", "num_groups", "is_second_stage", "enable_buffer_reuse"),
    "max_input_numel",
)
PARTS = ("weight", "input_tensors", "output_tensors", "bias", "target_device")
_SCALE_TYPES = ("float", *_FLOATS, "pof2", "float8_e5m3", "float8_e8m0fnu")
_OLD_MX = {"mx_element_dtype": "fp4", "group_size": 32}  # what the old data type "mx" is read with
_TENSOR_FP8 = "fp8_e4m3"  # per tensor: what scales are rounded to, or a weight whose codes are rounded again


@dataclass(frozen=True)
class TensorQuant:
    """element: our name of it. strategy: what shares a scale: the tensor, a channel, a group of group_size columns, or
    a block of block_rows by group_size.

    scale: what scales are: "float", "e8m0" (by the rounding mode), "e5m3", or "e4m3" under a second scale. scale_type:
    how a float scale is stored, "float" as the model's weights, "pof2" a power of two, else a dtype. is_interleaved:
    each group is stored after the byte of its scale. is_progressive: the tensor is rounded to E4M3 first, and this is
    the spec of what its codes are rounded to. second_type: as scale_type, of the second scale.
    """

    element: str
    strategy: str
    group_size: int
    is_dynamic: bool
    is_symmetric: bool
    scale: str
    mode: str = "even"
    block_rows: int = 0
    scale_type: str = "float"
    is_interleaved: bool = False
    is_progressive: bool = False
    second_type: str = "float"

    @classmethod
    def parse(cls, values: Any, label: str) -> TensorQuant | None:
        """A spec, or a list of two: of the tensor and of its scales or its codes. None for null, and for floats.

        Raises TypeError or ValueError naming the key.
        """
        values, second = _stages(values, label)
        if values is None or values.get("dtype") in _FLOATS:
            return None
        is_progressive = second is not None and second.get("dtype") in _INTEGERS and _is_tensor_fp8(values)
        if is_progressive:
            values, second = second, None
        is_interleaved = values.get("dtype") == "mx"
        if is_interleaved:
            values = _as_group(values, label)
        _check_words(values, label)
        scheme = values.get("qscheme") or "per_tensor"
        element, (rows, columns) = _ELEMENTS[values["dtype"]], _block(scheme, values, label)
        if scheme == "per_block" and "int" in element:
            raise ValueError(f"{label}.qscheme per_block serves floats of 8 bits and fewer, not {values['dtype']}")
        scale = _scale_of(values, second, label)
        if scale != "float" and "int" in element:
            raise ValueError(f"{label}: scales of {values['dtype']} are floats, not {scale}")
        return cls(
            element=element,
            strategy=_STRATEGIES[scheme],
            group_size=columns,
            is_dynamic=bool(values.get("is_dynamic")),
            is_symmetric=values.get("symmetric") is not False,
            scale=scale,
            mode=values.get("scale_calculation_mode") or "even",
            block_rows=rows,
            scale_type=values.get("scale_type") or "float",
            is_interleaved=is_interleaved,
            is_progressive=is_progressive,
            second_type=(second or {}).get("scale_type") or "float",
        )

    @property
    def is_exported(self) -> bool:
        """Whether quark itself writes such weights as codes."""
        return (self.element, self.strategy) not in _NOT_EXPORTED

    def activation(self) -> Activation:
        """The rounding of a layer's input or output. Scales per channel are meant, and taken, per token.

        Raises ValueError for what has no activation here: unsigned elements, blocks of several rows, and stored scales
        of more than the tensor.
        """
        from quantcore.sdk import Activation
        from quantcore_misc.quark.scaling import E8M0_RULES, LEAST_SCALE

        if self.element.startswith("uint"):
            raise ValueError(f"activations in {self.element} are not supported; use int8 or a float")
        if self.block_rows > 1:
            raise ValueError(f"activations in blocks of {self.block_rows} rows are not supported; use 1")
        if self.is_progressive:
            raise ValueError(f"activations rounded to {_TENSOR_FP8} and then {self.element} are not supported")
        is_below = self.element in _BELOW_8_BITS
        if self.scale == "float" and not self.is_dynamic and (self.strategy != "tensor" or is_below):
            raise ValueError(
                f"static activations in {self.element} by {self.strategy} are not supported; use per_tensor with 8 "
                "bits, or dynamic ones"
            )
        shared: dict[str, Any] = {
            "element": self.element,
            "strategy": {"channel": "token", "block": "group"}.get(self.strategy, self.strategy),
            "group_size": self.group_size,
            "is_symmetric": self.is_symmetric or "int" not in self.element,
            "zero_scale": LEAST_SCALE,
        }
        if self.scale == "e8m0":
            return Activation(**shared, scale=f"e8m0-{E8M0_RULES[self.mode]}", scale_math="input")
        if self.scale != "float":
            outer = "multiply" if self.scale == "e4m3" else None
            return Activation(**shared, scale=self.scale, outer=outer)
        if is_below:
            return Activation(**shared)
        # Scales are chosen in the input's dtype; integers are divided by them in float32, floats in that dtype too.
        code_math = "float32" if self.element.startswith("int") else "input"
        return Activation(
            **shared, is_static=not self.is_dynamic, scale="input", scale_math="input", code_math=code_math
        )


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
        for stage in _stages(values.get("weight"), f"{label}.weight"):
            if stage is not None and stage.get("qscheme") == "per_channel" and stage.get("ch_axis") in (1, -1):
                raise ValueError(f"{label}.weight.ch_axis must be 0, for a scale of each row, got {stage['ch_axis']}")
        parts = ("weight", "input_tensors", "output_tensors")
        return cls(*(TensorQuant.parse(values.get(part), f"{label}.{part}") for part in parts))


def _stages(values: Any, label: str) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The specs of a tensor and of its scales, each None where there is none."""
    stages = values if isinstance(values, list) else [values]
    if not 1 <= len(stages) <= 2:
        raise ValueError(f"{label}: a list holds one spec, or two: of the tensor and of its scales")
    for stage in stages:
        if stage is not None and not isinstance(stage, Mapping):
            raise TypeError(f"{label} must be a spec, a list of specs or null, got {values!r:.80}")
    return stages[0], stages[1] if len(stages) == 2 else None


def _as_group(values: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The spec of the old data type "mx" in today's words."""
    for key, known in _OLD_MX.items():
        if (values.get(key) or known) != known:
            raise ValueError(f"{label}.{key} must be {known!r} with dtype 'mx', got {values[key]!r:.80}")
    return {
        **values,
        "dtype": _OLD_MX["mx_element_dtype"],
        "qscheme": "per_group",
        "group_size": _OLD_MX["group_size"],
        "scale_format": "e8m0",
    }


def _block(scheme: str, values: Mapping[str, Any], label: str) -> tuple[int, int]:
    """Rows and columns that share a scale, 0 where the scheme says so without numbers."""
    if scheme == "per_group":
        return 0, _size(values.get("group_size"), f"{label}.group_size")
    if scheme != "per_block":
        return 0, 0
    size = values.get("block_size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"{label}.block_size must be two numbers, of rows and of columns, got {size!r:.80}")
    return _size(size[0], f"{label}.block_size"), _size(size[1], f"{label}.block_size")


def _size(value: Any, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{label} must be a positive integer, got {value!r:.80}")
    check_limits(value, label, maximum=1 << 24)
    return value


def _scale_of(values: Mapping[str, Any], second: Mapping[str, Any] | None, label: str) -> str:
    if second is not None:
        if not _is_tensor_fp8(second):
            raise ValueError(f"{label}[1] must be {_TENSOR_FP8} per_tensor, got {dict(second)!r:.120}")
        return "e4m3"
    written = str(values.get("scale_format") or values.get("scale_type") or "float")
    if "e8m0" in written:
        return "e8m0"
    return "e5m3" if "e5m3" in written else "float"


def _is_tensor_fp8(values: Mapping[str, Any]) -> bool:
    return values.get("dtype") == _TENSOR_FP8 and (values.get("qscheme") or "per_tensor") == "per_tensor"


def _check_words(values: Mapping[str, Any], label: str) -> None:
    """Raise TypeError or ValueError naming the key whose value is none of those that it may have."""
    if values.get("dtype") in _EMULATED:
        raise ValueError(
            f"{label}.dtype {values['dtype']!r} is only emulated by quark, which exports no codes of it; use one "
            f"of {', '.join(_ELEMENTS)}"
        )
    _check(values.get("dtype"), _ELEMENTS, f"{label}.dtype")
    _check(values.get("qscheme") or "per_tensor", _STRATEGIES, f"{label}.qscheme")
    _check(values.get("scale_calculation_mode") or "even", _MODES, f"{label}.scale_calculation_mode")
    _check(values.get("scale_type") or "float", _SCALE_TYPES, f"{label}.scale_type")
    _check(values.get("scale_format") or "float", _SCALE_FORMATS, f"{label}.scale_format")
    _check(values.get("round_method") or "half_even", _ROUNDINGS, f"{label}.round_method")
    for key in ("is_dynamic", "symmetric"):
        check_type(values.get(key), bool | None, f"{label}.{key}")
    _check_observer(values.get("observer_cls"), f"{label}.observer_cls")
    check_type(values.get("ch_axis"), int | None, f"{label}.ch_axis")
    check_limits(values.get("ch_axis"), f"{label}.ch_axis", choices=(None, 0, 1, -1, -2))


def _check_observer(value: Any, label: str) -> None:
    """Raise TypeError or ValueError for what is no class of quark's observers, whose list grows with its releases."""
    check_type(value, str | None, label)
    if value is not None and not (value.isidentifier() and "Observer" in value):
        raise ValueError(f"{label} must be the name of an observer, as PerTensorMinMaxObserver, got {value!r:.80}")


def _check(value: Any, choices: Mapping[str, Any] | tuple[str, ...], label: str) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{label} must be one of {', '.join(choices)}, got {value!r:.80}")
