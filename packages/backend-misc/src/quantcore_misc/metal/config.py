"""The config of transformers' metal method, and the dict that MLX writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, check_limits, check_type, option, spellings

_BITS = {None: (2, 4, 8), "affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "nvfp4": (4,), "mxfp8": (8,)}
_GROUPS = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


@dataclass(eq=False, repr=False)
class MetalConfig(QuantizationConfigMixin):
    """Groups of inputs with a scale and an offset, in the words of Apple's MLX.

    mode: None for the files and the rounding of transformers; of MLX "affine", or one of the small floats "mxfp4",
    "nvfp4", "mxfp8". Keys that name modules hold the settings of single layers as MLX writes them, or false.
    """

    quant_method = QuantizationMethod.METAL

    bits: int = option(4, help="bits of a code: 2, 4 or 8; of MLX's files 3, 5 and 6 as well")
    group_size: int = option(64, minimum=1, maximum=1 << 16, help="inputs that share a scale")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    mode: str | None = option(None, choices=tuple(_BITS)[1:], help="how MLX stores weights; none for transformers")

    def validate(self) -> None:
        """Check every field and the settings of single layers. Raises TypeError or ValueError naming the key."""
        super().validate()
        _check(self.bits, self.group_size, self.mode, "MetalConfig")
        for name, values in self.layers().items():
            if values is not False:
                check_type(values, dict[str, Any], f"MetalConfig[{name!r}]")
                _check(*self.settings(name), f"MetalConfig[{name!r}]")

    def layers(self) -> dict[str, Any]:
        """The settings of single layers, by name: a dict, or false for one that stays float."""
        return {
            name: value for name, value in self.__dict__.get("extra_keys", {}).items() if isinstance(value, dict | bool)
        }

    def of_layer(self, name: str) -> Any:
        """The settings of one layer, None where it has none of its own."""
        layers = self.layers()
        return next((layers[each] for each in spellings(name) if each in layers), None)

    def settings(self, name: str) -> tuple[int, int, str | None]:
        """Bits, columns of a group and mode of a layer."""
        own = self.of_layer(name)
        values: Mapping[str, Any] = own if isinstance(own, dict) else {}
        return values.get("bits", self.bits), values.get("group_size", self.group_size), values.get("mode", self.mode)

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON values; mode where it is one of MLX."""
        values = super().to_dict()
        if values.get("mode") is None:
            values.pop("mode", None)
        return values


def _check(bits: Any, group_size: Any, mode: Any, label: str) -> None:
    check_type(bits, int, f"{label}.bits")
    check_type(group_size, int, f"{label}.group_size")
    check_limits(mode, f"{label}.mode", choices=tuple(_BITS))
    check_limits(bits, f"{label}.bits", choices=_BITS[mode])
    if mode in _GROUPS and group_size != _GROUPS[mode]:
        raise ValueError(f"{label}.group_size must be {_GROUPS[mode]} in mode {mode}, got {group_size}")
