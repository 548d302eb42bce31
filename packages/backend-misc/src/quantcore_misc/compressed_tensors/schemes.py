"""What a config says of one kind of module: quantization arguments and schemes, parsed, checked and written back.

Names and defaults are those of the `quantization_config` that compressed-tensors 0.20 writes; the spellings of older
versions are read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import check_limits, check_type

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "marlin-24",
    "mixed-precision",
)
LEGACY_FORMATS = {"fakequant": "dense", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "uint8")
FLOAT_BITS = (4, 6, 8)
_GROUPED = ("group", "tensor_group")
_TYPES: dict[str, Any] = {
    "num_bits": int,
    "type": str,
    "symmetric": bool,
    "group_size": int | None,
    "strategy": str | None,
    "block_structure": list[int] | str | None,
    "dynamic": bool | str,
    "actorder": bool | str | None,
    "scale_dtype": str | None,
    "zp_dtype": str | None,
    "observer": str | None,
    "observer_kwargs": dict[str, Any] | None,
}
_ALWAYS_WRITTEN = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic")
_PARTS = ("weights", "input_activations", "output_activations")


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor is quantized: weights, an input, an output, or the key-value cache.

    dynamic: True, False, or "local": scales of groups at run time under a stored global scale.
    group_size: None unless strategy is group or tensor_group, which need it positive. block: rows and columns.
    observer, observer_kwargs: how scales were found; carried along, not read.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str = "tensor"
    block_structure: tuple[int, int] | None = None
    dynamic: bool | str = False
    actorder: str | None = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    @classmethod
    def parse(cls, values: Any, label: str) -> QuantizationArgs:
        """The arguments of a dict as in config.json. Raises TypeError or ValueError naming label and key."""
        check_type(values, dict[str, Any], label)
        unknown = sorted(set(values) - set(_TYPES))
        if unknown:
            raise ValueError(f"{label} has unknown keys {', '.join(unknown)}; use {', '.join(_TYPES)}")
        for key, value in values.items():
            check_type(value, _TYPES[key], f"{label}.{key}")
        args = cls(
            **{
                **values,
                "strategy": _strategy(values),
                "group_size": _group_size(values),
                "block_structure": _block(values.get("block_structure"), label),
                "actorder": _actorder(values.get("actorder"), label),
                "scale_dtype": _dtype(values.get("scale_dtype")),
                "zp_dtype": _dtype(values.get("zp_dtype")),
                "observer_kwargs": values.get("observer_kwargs") or None,
            }
        )
        args._check(label)
        return args

    def to_dict(self) -> dict[str, Any]:
        """JSON values; keys that say nothing are left out, as compressed-tensors 0.20 does."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for key in ("scale_dtype", "zp_dtype"):
            values[key] = None if values[key] is None else f"torch.{values[key]}"
        if self.block_structure is not None:
            values["block_structure"] = list(self.block_structure)
        if self.observer_kwargs is not None:
            values["observer_kwargs"] = dict(self.observer_kwargs)
        return {key: value for key, value in values.items() if value is not None or key in _ALWAYS_WRITTEN}

    @property
    def is_mx(self) -> bool:
        """Whether scales are powers of two in a byte, one per group of 32."""
        return self.type == "float" and (self.scale_dtype == "uint8" or self.num_bits == 6)

    @property
    def is_nvfp4(self) -> bool:
        """Whether scales of 16 are float8 under one float32 scale of the whole tensor."""
        return self.type == "float" and self.num_bits == 4 and self.strategy == "tensor_group"

    def _check(self, label: str) -> None:
        check_limits(self.type, f"{label}.type", choices=("int", "float"))
        if self.type == "int":
            check_limits(self.num_bits, f"{label}.num_bits", minimum=1, maximum=8)
        else:
            check_limits(self.num_bits, f"{label}.num_bits of type float", choices=FLOAT_BITS)
        check_limits(self.strategy, f"{label}.strategy", choices=STRATEGIES)
        check_limits(self.dynamic, f"{label}.dynamic", choices=(True, False, "local"))
        check_limits(self.scale_dtype, f"{label}.scale_dtype", choices=(None, *SCALE_DTYPES))
        check_limits(self.zp_dtype, f"{label}.zp_dtype", choices=(None, "int8", "uint8", *SCALE_DTYPES[:4]))
        self._check_group(label)
        if self.type == "float" and not self.symmetric:
            raise ValueError(f"{label}.symmetric must be true for floats: they have no zero point")
        if self.actorder in ("group", "weight", "static") and self.strategy not in ("group", "channel", "tensor_group"):
            raise ValueError(f"{label}.actorder {self.actorder!r} needs strategy group, not {self.strategy!r}")

    def _check_group(self, label: str) -> None:
        if self.strategy in _GROUPED and self.group_size is None:
            raise ValueError(f"{label}.group_size is missing; strategy {self.strategy!r} needs one")
        if self.group_size is not None:
            check_limits(self.group_size, f"{label}.group_size", minimum=1, maximum=1 << 24)
            if self.strategy not in _GROUPED:
                raise ValueError(f"{label}.group_size {self.group_size} contradicts strategy {self.strategy!r}")
        if self.strategy == "block" and self.block_structure is None:
            raise ValueError(f"{label}.block_structure is missing; strategy 'block' needs one such as [128, 128]")
        if self.dynamic == "local" and self.strategy != "tensor_group":
            raise ValueError(f"{label}.dynamic 'local' needs strategy tensor_group, not {self.strategy!r}")


@dataclass(frozen=True)
class Scheme:
    """What is done to the modules that targets name. group: the key in config_groups, for errors."""

    group: str
    targets: tuple[str, ...]
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: str | None = None

    @classmethod
    def parse(cls, group: str, values: Any, label: str) -> Scheme:
        """The scheme of a dict as in config.json. Raises TypeError or ValueError naming label and key."""
        check_type(values, dict[str, Any], label)
        unknown = sorted(set(values) - {"targets", "format", *_PARTS})
        if unknown:
            raise ValueError(f"{label} has unknown keys {', '.join(unknown)}; use targets, format, {', '.join(_PARTS)}")
        if "targets" not in values:
            raise ValueError(f"{label}.targets is missing; add a list such as ['Linear']")
        targets = values["targets"]
        check_type(targets, list[str], f"{label}.targets")
        parts = {
            part: None if values.get(part) is None else QuantizationArgs.parse(values[part], f"{label}.{part}")
            for part in _PARTS
        }
        scheme = cls(group, tuple(targets), format=parse_format(values.get("format"), f"{label}.format"), **parts)
        scheme._check(label)
        return scheme

    def to_dict(self) -> dict[str, Any]:
        parts = {part: None if (args := getattr(self, part)) is None else args.to_dict() for part in _PARTS}
        return {"targets": list(self.targets), **parts, "format": self.format}

    @property
    def storage(self) -> str:
        """The format in which upstream writes this scheme, the first that fits.

        Source: compressed-tensors 0.20, the order of its compressors.
        """
        weights = self.weights
        if weights is None:
            return "dense"
        if weights.is_mx:
            return {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}[weights.num_bits]
        if weights.is_nvfp4:
            return "nvfp4-pack-quantized"
        has_activations = self.input_activations is not None
        if weights.type == "int":
            return "int-quantized" if has_activations else "pack-quantized"
        if weights.num_bits == 8:
            return "float-quantized" if has_activations else "naive-quantized"
        return "dense"

    def _check(self, label: str) -> None:
        if self.weights is not None and self.weights.strategy in ("token", "attn_head"):
            raise ValueError(
                f"{label}.weights.strategy {self.weights.strategy!r} is one of activations, not of weights"
            )
        if self.weights is not None and self.weights.dynamic is not False:
            raise ValueError(f"{label}.weights.dynamic must be false: weights are quantized once")
        if self.format is not None and self.weights is not None and not self._fits(self.format):
            kind = f"{self.weights.num_bits}-bit {self.weights.type}, strategy {self.weights.strategy}"
            raise ValueError(
                f"{label}.format {self.format!r} cannot store weights that are {kind}; use {self.storage!r}"
            )

    def _fits(self, storage: str) -> bool:
        weights = self.weights
        assert weights is not None
        special = {"mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"}
        if storage in special or self.storage in special:
            return storage in (self.storage, "dense")
        if storage in ("pack-quantized", "int-quantized", "marlin-24"):
            return weights.type == "int"
        return storage != "float-quantized" or weights.type == "float"


def parse_format(value: Any, label: str) -> str | None:
    """A storage format by name, legacy names translated. Raises ValueError naming label."""
    check_type(value, str | None, label)
    name: str | None = LEGACY_FORMATS.get(value, value)
    check_limits(name, label, choices=(None, *FORMATS))
    return name


def _strategy(values: Mapping[str, Any]) -> str:
    strategy, size = values.get("strategy"), values.get("group_size")
    if strategy is not None:
        return str(strategy)
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _group_size(values: Mapping[str, Any]) -> int | None:
    size = values.get("group_size")
    return None if size == -1 else size  # -1: one group a row, which is the strategy channel


def _block(value: Any, label: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sizes = value.lower().split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(size) for size in sizes)
    except ValueError:
        raise ValueError(f"{label}.block_structure must be two numbers such as [128, 128], got {value!r:.60}") from None
    check_limits([rows, columns], f"{label}.block_structure", minimum=1, maximum=1 << 24)
    return rows, columns


def _actorder(value: Any, label: str) -> str | None:
    if isinstance(value, bool):
        return "group" if value else None
    value = {"dynamic": "group"}.get(value, value)
    check_limits(value, f"{label}.actorder", choices=(None, "weight", "static", "group"))
    return None if value is None else str(value)


def _dtype(value: str | None) -> str | None:
    return None if value is None else value.removeprefix("torch.")
