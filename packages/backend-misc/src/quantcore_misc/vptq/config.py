"""The config of VPTQ, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, check_limits, check_type, option, spellings

_UNUSED = -1
_LARGEST_CODEBOOK = 1 << 16


@dataclass(frozen=True)
class VptqLayerConfig:
    """How one layer is stored. vector_lens, num_centroids, num_res_centroids: of outliers, and of all other columns.

    -1 stands for none. group_size: columns of a group, -1 for what follows from the layer's shape.
    """

    enable_norm: bool = True
    enable_perm: bool = True
    group_num: int = 1
    group_size: int = -1
    in_features: int = -1
    out_features: int = -1
    indices_as_float: bool = False
    is_indice_packed: bool = True
    num_centroids: tuple[int, int] = (-1, -1)
    num_res_centroids: tuple[int, int] = (-1, -1)
    outlier_size: int = 0
    vector_lens: tuple[int, int] = (-1, -1)

    @classmethod
    def parse(cls, values: Any, label: str) -> VptqLayerConfig:
        """The settings of a dict as in config.json; keys of other tools are passed over.

        Raises TypeError or ValueError naming label and key.
        """
        check_type(values, dict[str, Any], label)
        known = {field.name: field.default for field in fields(cls) if field.name in values}
        for name, default in known.items():
            wanted = list[int] if isinstance(default, tuple) else type(default)
            value = list(values[name]) if isinstance(values[name], tuple) else values[name]
            check_type(value, wanted, f"{label}.{name}")
        settings: dict[str, Any] = {
            name: tuple(values[name]) if isinstance(known[name], tuple) else values[name] for name in known
        }
        found = cls(**settings)
        found._check(label)
        return found

    def _check(self, label: str) -> None:
        if not self.is_indice_packed:
            raise ValueError(f"{label}.is_indice_packed must be true: unpacked indices were never published")
        for name in ("vector_lens", "num_centroids", "num_res_centroids"):
            pair = getattr(self, name)
            if len(pair) != 2 or any(value != _UNUSED and value < 1 for value in pair):
                raise ValueError(f"{label}.{name} must be two numbers, each -1 or at least 1, got {list(pair)!r:.60}")
        for name in ("num_centroids", "num_res_centroids"):
            for value in getattr(self, name):
                if value != _UNUSED and (value & (value - 1) or value > _LARGEST_CODEBOOK):
                    raise ValueError(f"{label}.{name} must hold powers of two up to 65536, or -1, got {value}")
        if self.num_res_centroids[0] != _UNUSED:
            raise ValueError(f"{label}.num_res_centroids[0] must be -1: outliers have no residual codebook")
        if _UNUSED in (self.vector_lens[1], self.num_centroids[1]):
            raise ValueError(f"{label} needs vector_lens and num_centroids of its main columns, such as [-1, 8]")
        if self.outlier_size and _UNUSED in (self.vector_lens[0], self.num_centroids[0]):
            raise ValueError(
                f"{label}.outlier_size {self.outlier_size} needs vector_lens and num_centroids of outliers"
            )
        check_limits(self.outlier_size, f"{label}.outlier_size", minimum=0)
        check_limits(self.group_num, f"{label}.group_num", minimum=1)


@dataclass(eq=False, repr=False)
class VptqConfig(QuantizationConfigMixin):
    """Vector post-training quantization: the settings of each layer, by its full name or by the last part of it.

    Source: Liu et al. 2024, VPTQ (arXiv:2409.17066).
    """

    quant_method = QuantizationMethod.VPTQ

    enable_proxy_error: bool = option(False, choices=(False,), help="of upstream's quantizer; stays false")
    config_for_layers: dict[str, dict[str, Any]] = option(default_factory=dict, help="settings by full module name")
    shared_layer_config: dict[str, dict[str, Any]] = option(
        default_factory=dict, help="settings by the last part of a module's name"
    )
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")

    def validate(self) -> None:
        """Check every field and every layer's settings. Raises TypeError or ValueError naming the key."""
        super().validate()
        for name in ("config_for_layers", "shared_layer_config"):
            for key, values in getattr(self, name).items():
                VptqLayerConfig.parse(values, f"VptqConfig.{name}[{key!r}]")

    def for_layer(self, name: str) -> VptqLayerConfig | None:
        """The settings of a layer, None where the config has none; those of the only layer for one without a name."""
        values = self._values(name)
        return None if values is None else VptqLayerConfig.parse(values, f"VptqConfig: {name or 'layer'}")

    def _values(self, name: str) -> Mapping[str, Any] | None:
        known = next((each for each in spellings(name) if each in self.config_for_layers), None)
        if known is not None:
            return self.config_for_layers[known]
        if not name and len(self.config_for_layers) == 1:
            return next(iter(self.config_for_layers.values()))
        return self.shared_layer_config.get(name.rpartition(".")[2])
