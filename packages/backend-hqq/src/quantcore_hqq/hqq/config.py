"""The config of HQQ, with the names, defaults and JSON that transformers writes, and the spellings of older files."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_limits,
    check_type,
    diff_from_default,
)

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)
_WEIGHT = "weight_quant_params"
_PARTS = (_WEIGHT, "scale_quant_params", "zero_quant_params")
_MAX_GROUP_SIZE = 1 << 24
_TYPES: dict[str, Any] = {
    "nbits": int | float,
    "group_size": int | None,
    "axis": int,
    "channel_wise": bool,
    "optimize": bool,
    "round_zero": bool,
    "view_as_float": bool,
}
_LIMITS: dict[str, dict[str, Any]] = {
    "nbits": {"choices": BITS},
    "group_size": {"minimum": 8, "maximum": _MAX_GROUP_SIZE},
    "axis": {"choices": (0, 1)},
}


@dataclass(init=False, eq=False, repr=False)
class HqqConfig(QuantizationConfigMixin):
    """Half-quadratic quantization: a float zero point per group, refined without data.

    quant_config: one dict of settings for every layer, or one per layer tag ("self_attn.q_proj"); a layer with no tag
    stays float. Source: Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/.
    """

    quant_method = QuantizationMethod.HQQ
    option_help: ClassVar[dict[str, str]] = {
        "nbits": f"bits of a code: one of {', '.join(map(str, BITS))}",
        "group_size": "weights that share scale and zero, a multiple of 8; none means a whole row or column",
        "view_as_float": "store packed codes under the compute dtype",
        "axis": "1: groups along in_features; 0: along out_features",
        "dynamic_config": "the other settings for each layer tag; layers without a tag stay float",
        "skip_modules": "parts of names of modules that stay float",
    }

    quant_config: dict[str, Any]
    skip_modules: list[str]

    def __init__(
        self,
        nbits: int | float = 4,
        group_size: int | None = 64,
        view_as_float: bool = False,
        axis: int | None = None,
        dynamic_config: dict[str, Any] | None = None,
        skip_modules: list[str] | None = None,
    ) -> None:
        """dynamic_config: a dict of the other arguments for each layer tag. axis: None means 1."""
        self.skip_modules = ["lm_head"] if skip_modules is None else skip_modules
        if dynamic_config is None:
            self.quant_config = _settings(nbits, group_size, view_as_float, axis)
        else:
            check_type(dynamic_config, dict[str, dict[str, Any]], "HqqConfig.dynamic_config")
            self.quant_config = {tag: _settings(**_named(values, tag)) for tag, values in dynamic_config.items()}
        self.__post_init__()

    def validate(self) -> None:
        """Check every setting of every layer tag. Raises TypeError or ValueError naming the field."""
        super().validate()
        if not self.quant_config:
            raise ValueError("HqqConfig.quant_config is empty; no layer would be quantized")
        for label, settings in self.by_tag().items():
            _check_settings(settings, f"HqqConfig.quant_config{f'[{label!r}]' if label else ''}")

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        for label, given, known in super().key_places():
            yield label, given, {*known, *_CONSTRUCTOR}
        for tag, settings in self.by_tag().items():
            label = f"quant_config[{tag!r}]" if tag else "quant_config"
            yield label, settings, (*_PARTS, "offload_meta")
            for part in _PARTS:
                yield f"{label}.{part}", settings.get(part) or {}, _TYPES

    def by_tag(self) -> dict[str, dict[str, Any]]:
        """The settings per layer tag; the tag "" stands for every layer."""
        return {"": self.quant_config} if _WEIGHT in self.quant_config else self.quant_config

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json, or in one of the older and flat spellings."""
        if not isinstance(config_dict, Mapping):
            raise TypeError(f"HqqConfig: expected a dict, got {type(config_dict).__name__}: {config_dict!r:.80}")
        values = {str(key): copy.deepcopy(value) for key, value in config_dict.items() if key != "quant_method"}
        quant_config = values.pop("quant_config", None)
        if _WEIGHT in values:
            keys = [key for key in (*_PARTS, "offload_meta") if key in values]
            quant_config = {key: values.pop(key) for key in keys}
        flat = {key: values.pop(key) for key in _CONSTRUCTOR if key in values}
        config = cls(**flat)
        if quant_config is not None:
            config.update(quant_config=_completed(quant_config))
        config.extra_keys.update(values)
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return diff_from_default(self)


_CONSTRUCTOR = ("nbits", "group_size", "view_as_float", "axis", "dynamic_config", "skip_modules")


def _settings(
    nbits: int | float = 4, group_size: int | None = 64, view_as_float: bool = False, axis: int | None = None
) -> dict[str, Any]:
    return {
        _WEIGHT: {
            "nbits": nbits,
            "channel_wise": True,
            "group_size": group_size,
            "optimize": True,
            "round_zero": nbits == 4,
            "axis": 1 if axis is None else axis,
            "view_as_float": view_as_float,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def _named(values: Mapping[str, Any], tag: str) -> dict[str, Any]:
    allowed = ("nbits", "group_size", "view_as_float", "axis")
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise ValueError(f"HqqConfig.dynamic_config[{tag!r}] has unknown keys {unknown}; use {', '.join(allowed)}")
    return dict(values)


def _completed(quant_config: Any) -> Any:
    """The nested dict with the keys that older files leave out."""
    if not isinstance(quant_config, dict):
        return quant_config
    if _WEIGHT in quant_config:
        return {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False, **quant_config}
    if "nbits" in quant_config:  # flat, without the level of weight_quant_params
        return _completed({_WEIGHT: quant_config})
    return {tag: _completed(settings) for tag, settings in quant_config.items()}


def _check_settings(settings: Any, label: str) -> None:
    if not isinstance(settings, dict) or not isinstance(settings.get(_WEIGHT), dict):
        raise TypeError(f"{label} must be a dict with a dict {_WEIGHT!r}, got {settings!r:.80}")
    check_type(settings.get("offload_meta"), bool | None, f"{label}.offload_meta")
    for part in _PARTS:
        check_type(settings.get(part), dict[str, Any] | None, f"{label}.{part}")
        if settings.get(part) is not None:
            _check_part(settings[part], f"{label}.{part}")


def _check_part(part: Mapping[str, Any], label: str) -> None:
    if "nbits" not in part:
        raise ValueError(f"{label}.nbits is missing; use one of {', '.join(map(str, BITS))}")
    for key in _TYPES.keys() & part.keys():
        check_type(part[key], _TYPES[key], f"{label}.{key}")
        if part[key] is not None:
            check_limits(part[key], f"{label}.{key}", **_LIMITS.get(key, {}))
    group_size = part.get("group_size")
    if group_size is not None and group_size % 8:
        raise ValueError(f"{label}.group_size must be a multiple of 8, got {group_size}")
