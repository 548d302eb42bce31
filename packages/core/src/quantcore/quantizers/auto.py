"""From a config, or a dict as found in config.json, to the classes that the installed backend provides."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from quantcore.errors import BackendBrokenError
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin, check_nesting
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.mappings import VARIANTS, ServedClasses

logger = logging.getLogger(__name__)

ConfigClass = TypeVar("ConfigClass", bound=type[QuantizationConfigMixin])
QuantizerClass = TypeVar("QuantizerClass", bound=type[HfQuantizer])
Base = TypeVar("Base")

# Classes that a program registered by decorator; they go before those of installed backends.
_registered_configs: dict[str, type[QuantizationConfigMixin]] = {}
_registered_quantizers: dict[str, type[HfQuantizer]] = {}


def register_quantization_config(method: str, *, override: bool = False) -> Callable[[ConfigClass], ConfigClass]:
    """Class decorator: the config class of a method, for this process.

    Raises ValueError when the name is taken and override is false, TypeError for a class of another kind.
    """
    return _register(_registered_configs, method, QuantizationConfigMixin, override)


def register_quantizer(method: str, *, override: bool = False) -> Callable[[QuantizerClass], QuantizerClass]:
    """Class decorator: the quantizer class of a method, for this process.

    Raises ValueError when the name is taken and override is false, TypeError for a class of another kind.
    """
    return _register(_registered_quantizers, method, HfQuantizer, override)


def unregister(method: str) -> None:
    """Forget what the two decorators registered for a method; an installed backend serves it again."""
    name = normalize_method(method)
    _registered_configs.pop(name, None)
    _registered_quantizers.pop(name, None)


def config_class(method: str) -> type[QuantizationConfigMixin]:
    """The config class of a method. Raises what `Plugins.backend` raises."""
    name = normalize_method(method)
    if name in _registered_configs:
        return _registered_configs[name]
    return _expect_class(plugins().resolve(name, "config"), QuantizationConfigMixin, name)


def quantizer_class(config: QuantizationConfigMixin) -> type[HfQuantizer]:
    """The quantizer class that serves a config. Raises what `Plugins.backend` raises."""
    name = normalize_method(config.quant_method)
    if name in _registered_quantizers:
        return _registered_quantizers[name]
    target = plugins().resolve(name, "quantizer")
    return _expect_class(target if inspect.isclass(target) else target(config), HfQuantizer, name)


def _usual_quantizer(method: str) -> type[HfQuantizer]:
    """The quantizer class of a method's name; of a method that has several, that of its first example config."""
    name = normalize_method(method)
    if name in _registered_quantizers:
        return _registered_quantizers[name]
    example = VARIANTS.get(method) or next(iter(plugins().backend(name).example_configs), {})
    config = config_class(name).from_dict({"quant_method": name, **example})
    assert isinstance(config, QuantizationConfigMixin)
    return quantizer_class(config)


AUTO_QUANTIZER_MAPPING: Mapping[str, type[HfQuantizer]] = ServedClasses(
    _usual_quantizer, lambda: _registered_quantizers
)
AUTO_QUANTIZATION_CONFIG_MAPPING: Mapping[str, type[QuantizationConfigMixin]] = ServedClasses(
    config_class, lambda: _registered_configs
)


def is_served(method: str) -> bool:
    """Whether a backend or this program provides a method; imports no plugin."""
    name = normalize_method(method)
    return name in _registered_quantizers or plugins().owner(name) is not None


class AutoQuantizationConfig:
    """Config objects from dicts and checkpoints."""

    @classmethod
    def from_dict(cls, quantization_config_dict: Mapping[str, Any]) -> QuantizationConfigMixin:
        """The config of a dict as found in config.json.

        Raises TypeError for what is no dict or has a method that is no string, ValueError naming the field for values
        that cannot be, and what `Plugins.backend` raises for an unknown or absent method.
        """
        method = method_of(quantization_config_dict)
        check_nesting(quantization_config_dict, "quantization_config")
        config = config_class(method).from_dict(quantization_config_dict)
        assert isinstance(config, QuantizationConfigMixin)
        return config

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> QuantizationConfigMixin:
        """The config that stands in a checkpoint's config.json. Raises ValueError when the model is not quantized."""
        from quantcore.checkpoints.read import quantization_dict, read_config, resolve

        directory = resolve(pretrained_model_name_or_path)
        found = quantization_dict(read_config(directory))
        if found is None:
            raise ValueError(f"{directory}: config.json has no quantization_config; this model is not quantized")
        config = cls.from_dict(found)
        config.update(**kwargs)
        return config


class AutoHfQuantizer:
    """Quantizer objects from configs."""

    @classmethod
    def from_config(cls, quantization_config: Any, **kwargs: Any) -> HfQuantizer:
        """The quantizer of a config or dict; keywords such as pre_quantized go to its constructor.

        Raises ValueError for a key that nobody knows, which only what is stored quantized may have.
        """
        config = as_config(quantization_config)
        if not kwargs.setdefault("pre_quantized", False):
            config.check_quantizes()
        elif unknown := config.unknown_keys():
            logger.warning("%s has %s; that is kept, and changes nothing", type(config).__name__, "; ".join(unknown))
        return quantizer_class(config)(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> HfQuantizer:
        """The quantizer of a quantized checkpoint."""
        config = AutoQuantizationConfig.from_pretrained(pretrained_model_name_or_path)
        return cls.from_config(config, **{"pre_quantized": True, **kwargs})

    @classmethod
    def merge_quantization_configs(
        cls, quantization_config: Any, quantization_config_from_args: QuantizationConfigMixin | None = None
    ) -> QuantizationConfigMixin:
        """The checkpoint's config with the loading attributes of the user's set on it.

        Raises ValueError when the two are for different methods.
        """
        config = as_config(quantization_config)
        if quantization_config_from_args is None:
            return config
        ours, theirs = type(config).__name__, type(quantization_config_from_args).__name__
        if ours != theirs:
            raise ValueError(f"the model is quantized with {ours} but a {theirs} was passed; pass a {ours} or none")
        changes = quantization_config_from_args.get_loading_attributes()
        config.update(**changes)
        logger.warning(
            "the checkpoint's own quantization_config is used; of the one passed, only %s count",
            sorted(changes) or "none",
        )
        return config

    @classmethod
    def supports_quant_method(cls, quantization_config_dict: Mapping[str, Any]) -> bool:
        """True when a backend serves the dict's method.

        Raises instead of giving False: a model whose method is not served must never be loaded as if it were float.
        """
        config_class(method_of(quantization_config_dict))
        return True


def as_config(config: Any) -> QuantizationConfigMixin:
    """A config object of a config, a dict, a method name, or an object of another library with `to_dict`."""
    if isinstance(config, QuantizationConfigMixin):
        return config
    if isinstance(config, str):
        return AutoQuantizationConfig.from_dict({"quant_method": config})
    if inspect.isclass(config):
        raise TypeError(f"quantization_config must be an object, got the class {config.__name__}; call it")
    if not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    return AutoQuantizationConfig.from_dict(config)


def method_of(config_dict: Mapping[str, Any]) -> str:
    """The canonical method name of a config dict; dicts of old without quant_method are matched by plugins."""
    if not isinstance(config_dict, Mapping):
        raise TypeError(f"quantization_config must be a dict, got {type(config_dict).__name__}: {config_dict!r:.80}")
    method = config_dict.get("quant_method")
    if method is None:
        method = plugins().match(config_dict)
    if method is None:
        installed = ", ".join(sorted(_installed())) or "none"
        raise ValueError(f"quantization_config has no quant_method; add one. Installed methods: {installed}")
    return normalize_method(method)


def _installed() -> list[str]:
    from quantcore.plugins.discovery import methods

    return [info.method for info in methods() if info.installed]


def _served(method: str) -> str | None:
    owner = plugins().owner(method)
    return None if owner is None else f"served by {owner}"


def _expect_class(cls: Any, base: type[Base], method: str) -> type[Base]:
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise BackendBrokenError(
            f"method {method!r}: {plugins().owner(method)} gives {cls!r:.80} where a subclass of {base.__name__} "
            "is needed; report this to its authors"
        )
    return cls


def _register(registry: dict[str, Any], method: str, base: type, override: bool) -> Callable[[Any], Any]:
    name = normalize_method(method)

    def decorate(cls: Any) -> Any:
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            raise TypeError(f"{name!r}: expected a subclass of {base.__name__}, got {cls!r:.80}")
        owner = f"registered already, as {registry[name].__name__}" if name in registry else _served(name)
        if owner is not None and not override:
            raise ValueError(f"{name!r} is {owner}; pass override=True to replace it")
        registry[name] = cls
        return cls

    return decorate
