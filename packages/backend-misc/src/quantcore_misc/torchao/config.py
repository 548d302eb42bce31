"""The config of torchao, with the names, defaults and JSON that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantcore.sdk import (
    Config,
    QuantizationConfigMixin,
    QuantizationMethod,
    option,
    patterns,
    spellings,
)
from quantcore_misc.torchao.kinds import FQN, KINDS, of_2024, read_kind
from quantcore_misc.torchao.words import described, encode, is_object

_LABEL = "TorchAoConfig.quant_type"
_KWARGS = "quant_type_kwargs"  # beside a quant_type that is a name, until transformers 4.57


class QuantType(str):
    """The name of one of torchao's config classes, which knows the fields.

    fields: as config.json has them, all of them, in today's version.
    """

    fields: dict[str, Any]

    def __new__(cls, name: str, fields: Mapping[str, Any]) -> QuantType:
        found = super().__new__(cls, name)
        found.fields = dict(fields)
        return found

    def __getnewargs__(self) -> tuple[str, dict[str, Any]]:  # type: ignore[override]
        return str(self), self.fields

    def to_json(self) -> dict[str, Any]:
        """As config.json has it."""
        return described(str(self), self.fields, KINDS[self].version)


@dataclass(eq=False, repr=False)
class TorchAoConfig(QuantizationConfigMixin):
    """One config of torchao for all layers, or by name of a layer.

    quant_type: an object of torchao, what config.json has for one, or the name of its class, for its defaults. It is
    held as a `QuantType`, in today's version: of version 1, and of the names of 2024, what took their place.
    Source: transformers 5.23, torchao 0.18.
    """

    quant_method = QuantizationMethod.TORCHAO

    quant_type: str | dict[str, Any] = option(help="a config of torchao as JSON, or the name of its class")
    modules_to_not_convert: list[str] | None = option(None, help="modules that stay float")
    include_input_output_embeddings: bool = option(False, help="quantize embeddings, and the head, too")
    untie_embedding_weights: bool = option(False, help="give a head that is tied to an embedding its own weight")

    def validate(self) -> None:
        """Check every field. Raises TypeError or ValueError naming it."""
        self.quant_type = _read(self.quant_type)
        super().validate()

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Config | tuple[Config, dict[str, Any]]:
        """A config of a dict as in config.json, of any age."""
        if isinstance(config_dict, Mapping) and _KWARGS in config_dict:
            config_dict = dict(config_dict)
            given, name = config_dict.pop(_KWARGS), config_dict.get("quant_type")
            if not isinstance(given, Mapping | None):
                raise TypeError(f"TorchAoConfig.{_KWARGS} must be a dict, got {type(given).__name__}: {given!r:.80}")
            if isinstance(name, str):
                config_dict["quant_type"] = QuantType(*of_2024(name, given or {}, _LABEL))
            elif given:
                config_dict[_KWARGS] = given
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        assert isinstance(self.quant_type, QuantType)
        found = super().to_dict()
        return {**found, "quant_type": {"default": encode(self.quant_type.to_json())}}

    def get_apply_tensor_subclass(self) -> Any:
        """What layers are quantized with."""
        return self.quant_type

    def for_layer(self, name: str) -> QuantType | None:
        """The config of the layer of this name, None where it stays float.

        Names of a config are looked for in the order: the parameter's, the module's, the first pattern that fits the
        parameter, the first that fits the module, "_default".
        """
        assert isinstance(self.quant_type, QuantType)
        if self.quant_type != FQN:
            return self.quant_type
        configs: Mapping[str, Any] = self.quant_type.fields["fqn_to_config"]
        key = _key_of(name, configs)
        return None if key is None or configs[key] is None else QuantType(*read_kind(configs[key], key))

    def kinds(self) -> list[QuantType]:
        """Every config of a layer that this one holds."""
        assert isinstance(self.quant_type, QuantType)
        if self.quant_type != FQN:
            return [self.quant_type]
        configs = self.quant_type.fields["fqn_to_config"]
        return [QuantType(*read_kind(value, key)) for key, value in configs.items() if value is not None]


def _key_of(name: str, configs: Mapping[str, Any]) -> str | None:
    names = list(spellings(name))
    parameters = [f"{each}.weight" if each else "weight" for each in names]
    for candidates in (parameters, names):
        for each in candidates:
            if each in configs:
                return each
    expressions = [key for key in configs if key.startswith("re:")]
    for candidates in (parameters, names):
        for key in expressions:
            if any(patterns.matches(key.removeprefix("re:"), each, "whole") for each in candidates):
                return key
    return "_default" if "_default" in configs else None


def _read(value: Any) -> QuantType:
    """What any spelling of a quant_type says. Raises TypeError or ValueError."""
    if isinstance(value, QuantType):
        return QuantType(*read_kind(value.to_json(), _LABEL))
    if isinstance(value, str):
        return QuantType(*of_2024(value, {}, _LABEL))
    if isinstance(value, Mapping) and not is_object(value):
        if set(value) != {"default"}:
            raise ValueError(f"{_LABEL} must have the one key 'default', got {sorted(map(str, value))!r:.80}")
        value = value["default"]
    if not isinstance(value, Mapping):
        try:
            value = encode(value)
        except TypeError as error:
            raise TypeError(f"{_LABEL}: {error}") from error
    if not is_object(value):
        raise TypeError(
            f"{_LABEL} must be a config of torchao, the JSON of one, or the name of its class, got {value!r:.80}"
        )
    return QuantType(*read_kind(value, _LABEL))
