"""The config of compressed-tensors, with the names, defaults and JSON of transformers and llm-compressor."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantcore.sdk import (
    QuantizationConfigMixin,
    QuantizationMethod,
    check_type,
    diff_from_default,
    option,
    to_json_value,
)
from quantcore_misc.compressed_tensors.matching import check_pattern
from quantcore_misc.compressed_tensors.presets import PRESETS, preset
from quantcore_misc.compressed_tensors.schemes import QuantizationArgs, Scheme, parse_format
from quantcore_misc.compressed_tensors.transform_config import check_transforms

STATUSES = ("initialized", "calibration", "frozen", "compressed")
SPARSITY_FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")
_WRAPPERS = ("compression_config", "quantization_config")  # keys under which older files nest the whole config
_LOADING = ("dequantize", "use_optimized_inference")
_SOLVING = ("solver", "dampening_frac")
_WRITTEN_IF_SET = ("run_compressed", *_LOADING, *_SOLVING, "sparsity_config", "transform_config", "version")


@dataclass(eq=False, repr=False)
class CompressedTensorsConfig(QuantizationConfigMixin):
    """Schemes by target in the dialect of compressed-tensors: what RedHatAI publishes and vLLM reads.

    config_groups: a scheme per group, a dict of targets, weights, input_activations, output_activations and format, or
    the targets of a preset that the group's key names: {"FP8_DYNAMIC": ["Linear"]}. A scheme that is not named by
    config_groups or scheme quantizes nothing. solver, dampening_frac and actorder say how codes are chosen, as the
    GPTQModifier of llm-compressor has it; of the three, a saved config keeps what stands in config_groups.
    """

    quant_method = QuantizationMethod.COMPRESSED_TENSORS
    option_help: ClassVar[dict[str, str]] = {
        "scheme": f"preset for every Linear layer: one of {', '.join(PRESETS)}",
        "config_groups": "schemes by group: targets, weights, input_activations, output_activations, format",
        "ignore": "modules that stay float: full names, re:patterns, or names of classes",
        "actorder": "order of columns for the scheme's solver: static (with a solver the default), group, or false",
    }

    config_groups: dict[str, Any] | None = option(None, help="schemes by group")
    format: str = option("dense", help="storage format")
    quantization_status: str = option("initialized", choices=STATUSES, help="how far a checkpoint is quantized")
    kv_cache_scheme: dict[str, Any] | None = option(None, help="arguments of the key-value cache's quantization")
    global_compression_ratio: float | int | None = option(None, help="informative")
    ignore: list[str] | None = option(None, help="modules that stay float")
    run_compressed: bool | None = option(None, help="deprecated; false means dequantize")
    dequantize: bool = option(False, help="give the model float weights while it loads")
    use_optimized_inference: bool = option(False, help="8-bit float layers multiply rows scaled in float32")
    sparsity_config: dict[str, Any] | None = option(None, help="how sparse weights are stored")
    transform_config: dict[str, Any] | None = option(None, help="rotations of weights and activations")
    version: str | None = option(None, help="of compressed-tensors, as which the config is to be read")
    moe_sparsity_config: dict[str, Any] | None = option(None, help="carried along")
    solver: str | None = option(None, help="method that chooses the codes by calibration data, such as gptq")
    dampening_frac: float | None = option(None, minimum=0, maximum=1, help="damping of the solver's Hessian")
    scheme: dataclasses.InitVar[str | None] = None
    actorder: dataclasses.InitVar[bool | str | None] = None

    def __post_init__(self, scheme: str | None, actorder: bool | str | None) -> None:
        self._read: dict[str, Any] = {}  # what a file said, where that is not how it is written today
        if scheme is not None:
            check_type(scheme, str, "CompressedTensorsConfig.scheme")
            if self.config_groups is not None:
                raise ValueError("CompressedTensorsConfig.scheme and config_groups exclude each other; give one")
            self.config_groups = {"group_0": _ordered(preset(scheme, ["Linear"]), self.solver, actorder)}
        elif actorder is not None:
            raise ValueError(
                "CompressedTensorsConfig.actorder needs scheme; else it stands in weights of config_groups"
            )
        super().__post_init__()

    def validate(self) -> None:
        """Check and normalise every group. Raises TypeError or ValueError naming group and key."""
        super().validate()
        self.format = parse_format(self.format, self._label("format")) or "dense"
        if self.run_compressed is False:
            self.dequantize = True
        for target in self.ignore or ():
            check_pattern(target, self._label("ignore"))
        self._parse_groups()
        cache = self.cache_args
        self.kv_cache_scheme = None if cache is None else cache.to_dict()
        if self.dampening_frac is not None and self.solver is None:
            raise ValueError(f"{self._label('dampening_frac')} is of a solver; set solver, such as 'gptq', too")
        self._check_sparsity()
        check_transforms(self.transform_config, self._label("transform_config"))

    def schemes(self) -> tuple[Scheme, ...]:
        """The groups, parsed."""
        groups = (self.config_groups or {}).items()
        return tuple(Scheme.parse(name, values, self._group_label(name)) for name, values in groups)

    @property
    def cache_args(self) -> QuantizationArgs | None:
        """How keys and values are quantized, parsed; None leaves them float."""
        values = self.kv_cache_scheme
        return None if values is None else QuantizationArgs.parse(values, self._label("kv_cache_scheme"))

    @property
    def sparsity(self) -> Mapping[str, Any]:
        """The sparsity config that says something; {} when weights are stored whole."""
        found = self.sparsity_config or {}
        return found if found.get("format", "dense") != "dense" else {}

    @property
    def has_fp8_modules(self) -> bool:
        """Whether a group stores 8-bit floats."""
        weights = [scheme.weights for scheme in self.schemes() if scheme.weights is not None]
        return any(args.type == "float" and args.num_bits == 8 for args in weights)

    @property
    def is_quantized(self) -> bool:
        return bool(self.config_groups) or self.kv_cache_scheme is not None

    @property
    def is_quantization_compressed(self) -> bool:
        return self.is_quantized and self.quantization_status == "compressed"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config of a dict as in config.json, also one nested under `compression_config` as older files have it."""
        values = _unwrapped(config_dict)
        scheme, actorder = values.pop("scheme", None), values.pop("actorder", None)
        if scheme is not None or actorder is not None:
            given: dict[str, Any] = {key: values.get(key) for key in ("config_groups", "solver")}
            values["config_groups"] = cls(scheme=scheme, actorder=actorder, **given).config_groups
        read: Any = super().from_dict(values, return_unused_kwargs=True, **kwargs)
        config, unused = read
        if values.get("version") is not None and scheme is None:
            config._read = {key: copy.deepcopy(value) for key, value in values.items() if key not in kwargs}
        return (config, unused) if return_unused_kwargs else config

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        for label, given, known in super().key_places():
            yield label, given, {*known, "scheme", "actorder"}

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json, in the spelling of compressed-tensors 0.20.

        A file that names its version keeps its own keys and spelling where the values are still the same.
        """
        values = super().to_dict()
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for key in default:
            optional = key in _WRITTEN_IF_SET or self._read
            if key not in self._read and optional and values[key] == default[key]:
                del values[key]
        return {**values, **self._unchanged()}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return diff_from_default(self)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LOADING}

    def _unchanged(self) -> dict[str, Any]:
        """What was read of each field that still says the same."""
        if not self._read:
            return {}
        names = {field.name for field in dataclasses.fields(self)}
        then = type(self)(**{key: copy.deepcopy(value) for key, value in self._read.items() if key in names})
        return {
            key: to_json_value(value)
            for key, value in self._read.items()
            if key in names and getattr(then, key) == getattr(self, key)
        }

    def _parse_groups(self) -> None:
        groups = self.config_groups
        if groups is None:
            return
        expanded = {
            name: preset(name, values, self.version) if isinstance(values, list) else values
            for name, values in groups.items()
        }
        schemes = [Scheme.parse(name, values, self._group_label(name)) for name, values in expanded.items()]
        self._check_agreement(schemes)
        self.config_groups = {scheme.group: scheme.to_dict() for scheme in schemes}

    def _check_agreement(self, schemes: list[Scheme]) -> None:
        """Refuse two groups that say different things of one target."""
        owners: dict[str, Scheme] = {}
        for scheme in schemes:
            for target in scheme.targets:
                check_pattern(target, f"{self._group_label(scheme.group)}.targets")
                other = owners.setdefault(target, scheme)
                if dataclasses.replace(other, group="", targets=()) != dataclasses.replace(
                    scheme, group="", targets=()
                ):
                    raise ValueError(
                        f"{self._label('config_groups')}: groups {other.group!r} and {scheme.group!r} give target "
                        f"{target!r} different schemes; leave it in one of them"
                    )

    def _check_sparsity(self) -> None:
        if self.sparsity_config is None:
            return
        name, label = self.sparsity_config.get("format", "dense"), self._label("sparsity_config")
        if name not in SPARSITY_FORMATS:
            raise ValueError(f"{label}.format must be one of {', '.join(SPARSITY_FORMATS)}, got {name!r:.40}")
        for key in ("targets", "ignore"):
            check_type(self.sparsity_config.get(key), list[str] | None, f"{label}.{key}")

    def _group_label(self, name: str) -> str:
        return f"{self._label('config_groups')}[{name!r}]"


def _ordered(group: dict[str, Any], solver: str | None, actorder: bool | str | None) -> dict[str, Any]:
    """The group of a preset with the order of columns that the user gives, else that of GPTQ in llm-compressor."""
    weights = group["weights"]
    if actorder is None:
        is_grouped = solver is not None and weights is not None and weights["strategy"] == "group"
        actorder = "static" if is_grouped else None
    return group if actorder is None else {**group, "weights": {**(weights or {}), "actorder": actorder}}


def _unwrapped(config_dict: Any) -> dict[str, Any]:
    if not isinstance(config_dict, Mapping):
        raise TypeError(
            f"CompressedTensorsConfig: expected a dict, got {type(config_dict).__name__}: {config_dict!r:.80}"
        )
    values = dict(config_dict)
    for key in _WRAPPERS:
        if isinstance(values.get(key), Mapping):
            inner = values.pop(key)
            values = {**inner, **{name: value for name, value in values.items() if name not in inner}}
    return values
