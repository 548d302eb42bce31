"""The config of AMD Quark, as it stands in config.json, and what it says of one layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    check_limits,
    check_type,
    option,
    spellings,
)
from quantcore_misc.quark.spec import KEYS, PARTS, LayerSpec, TensorQuant

_EXPORT_CHOICES = {"pack_method": ("reorder", "order"), "weight_format": ("real_quantized", "fake_quantized")}


@dataclass(eq=False, repr=False)
class QuarkConfig(QuantizationConfigMixin):
    """Specs of weights, inputs and outputs: global ones, and others for layers by name or by type.

    Source: the exports of AMD Quark 0.13, and of versions that wrote no `export`.
    """

    quant_method = QuantizationMethod.QUARK

    global_quant_config: dict[str, Any] = option(help="specs of weight, input_tensors, output_tensors and bias")
    exclude: list[str] | None = option(default_factory=lambda: ["lm_head"], help="patterns of layers that stay float")
    layer_quant_config: dict[str, Any] | None = option(default_factory=dict, help="specs by pattern of layer names")
    layer_type_quant_config: dict[str, Any] | None = option(default_factory=dict, help="specs by type of layers")
    kv_cache_quant_config: dict[str, Any] | None = option(default_factory=dict, help="specs of key and value layers")
    kv_cache_post_rope: bool | None = option(False, help="round keys after RoPE where scales stand with attention")
    quant_mode: str | None = option("eager_mode", help="kept for other tools")
    algo_config: Any = option(None, help="how the checkpoint was made; kept")
    softmax_quant_spec: Any = option(None, help="kept for other tools")
    export: dict[str, Any] | None = option(None, help="pack_method, weight_format, kv_cache_group, min_kv_scale")
    version: str | None = option(None, help="of quark")

    def validate(self) -> None:
        """Check every field and spec. Raises TypeError or ValueError naming it."""
        super().validate()
        for label, layer in self._layers():
            LayerSpec.parse(layer, f"QuarkConfig.{label}")
        for name, allowed in _EXPORT_CHOICES.items():
            value = (self.export or {}).get(name, allowed[0])
            if value not in allowed:
                raise ValueError(f"QuarkConfig.export.{name} must be one of {', '.join(allowed)}, got {value!r:.80}")
        floor = (self.export or {}).get("min_kv_scale")
        check_type(floor, float | int | None, "QuarkConfig.export.min_kv_scale")
        check_limits(floor, "QuarkConfig.export.min_kv_scale", minimum=0)

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json; files older than `export` may hold null for any list or dict."""
        if isinstance(config_dict, Mapping) and "exclude" not in config_dict:
            config_dict = {**config_dict, "exclude": None}
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def key_places(self) -> Iterator[tuple[str, Iterable[str], Collection[str]]]:
        yield from super().key_places()
        for label, layer in self._layers():
            yield label, layer, PARTS
            for part, spec in layer.items():
                for stage in spec if isinstance(spec, list) else [spec or {}]:
                    yield f"{label}.{part}", stage if isinstance(stage, Mapping) else {}, KEYS

    @property
    def pack_method(self) -> str:
        """The order of 4-bit codes in a word."""
        return str((self.export or {}).get("pack_method", "reorder"))

    @property
    def min_kv_scale(self) -> float:
        """The least that a scale of keys or values is."""
        return float((self.export or {}).get("min_kv_scale") or 0.0)

    @property
    def is_fake(self) -> bool:
        """Whether weights are stored as floats, beside the scales to round them under."""
        return (self.export or {}).get("weight_format") == "fake_quantized"

    @property
    def custom_mode(self) -> str:
        """The mode of the export; those of other modes are files of fp8 and awq, and name these methods."""
        return "quark"

    @property
    def legacy(self) -> bool:
        """Whether the file is older than the key `export`."""
        return self.export is None

    def for_layer(self, name: str, type_name: str) -> LayerSpec | None:
        """What is rounded of the layer of this name and type, by the first pattern that fits; None where nothing is."""
        if any(fnmatchcase(spelled, pattern) for pattern in self.exclude or () for spelled in spellings(name)):
            return None
        found = self._spec_of(name, type_name)
        layer = LayerSpec.parse(found, f"the spec of {name}")
        return None if layer == LayerSpec(None, None, None) else layer

    def layers(self) -> list[LayerSpec]:
        """Every spec of a layer that the config holds."""
        return [LayerSpec.parse(spec, label) for label, spec in self._layers()]

    def cache_spec(self) -> TensorQuant | None:
        """How keys and values are rounded where their scales stand with attention modules."""
        for spec in (self.kv_cache_quant_config or {}).values():
            output = LayerSpec.parse(spec, "QuarkConfig.kv_cache_quant_config").output
            if output is not None:
                return output
        return None

    def _spec_of(self, name: str, type_name: str) -> Any:
        for specs in (self.layer_quant_config, self.kv_cache_quant_config):
            for pattern, spec in (specs or {}).items():
                if any(fnmatchcase(spelled, pattern) for spelled in spellings(name)):
                    return spec
        return (self.layer_type_quant_config or {}).get(type_name, self.global_quant_config)

    def _layers(self) -> list[tuple[str, Any]]:
        named = {
            field: getattr(self, field) or {}
            for field in ("layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config")
        }
        others = [(f"{field}[{key!r}]", spec) for field, specs in named.items() for key, spec in specs.items()]
        return [("global_quant_config", self.global_quant_config), *others]
