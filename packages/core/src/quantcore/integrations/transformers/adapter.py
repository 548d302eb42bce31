"""The quantizer that transformers sees: its own interface in front of a quantcore quantizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers.quantizers import HfQuantizer as TransformersQuantizer, auto as stock

from quantcore import transformers_names as inside
from quantcore.checkpoints.described import told_with_place
from quantcore.checkpoints.layers import stored_layers
from quantcore.checkpoints.names import name_in_checkpoint
from quantcore.checkpoints.offload import offloaded_state_dict
from quantcore.checkpoints.read import quantization_beside
from quantcore.distributed.parallel_layers import parallel_layers, whole_layers
from quantcore.integrations.transformers.calibrating import CalibratingLoad, calibrates, check_data
from quantcore.integrations.transformers.counting import count_float_weights
from quantcore.integrations.transformers.quantizing import QuantizingLoad
from quantcore.integrations.transformers.splitting import TensorSplit, refuse_untold
from quantcore.integrations.transformers.stored import StoredLoad
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin, as_dtype
from quantcore.quantizers.auto import AutoHfQuantizer, as_config, config_class, method_of
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.weight import WeightQuantizer

# What models carry as `quantization_method`: no method's name, by which transformers would call the upstream package.
SERVED = "quantcore"


class ServedQuantizer(TransformersQuantizer):  # type: ignore[misc]  # transformers is untyped
    """transformers' quantizer over one of quantcore's.

    transformers builds the model, names the devices, reads the files and ties the weights; this class puts quantized
    layers into the model and gives each the tensors that are its own. shown: the config that models carry; None for
    the quantizer's own, which keeps keys that transformers' class of the same name would drop.
    """

    def __init__(self, quantizer: HfQuantizer, shown: Any = None) -> None:
        super().__init__(shown or quantizer.quantization_config, pre_quantized=quantizer.pre_quantized)
        self.quantizer = quantizer
        self.split: TensorSplit | None = None  # how the load splits the model
        self._load: StoredLoad | QuantizingLoad | CalibratingLoad | None = None

    @property
    def method(self) -> str:
        """The name of the method that is served."""
        return method_of(self.quantizer.quantization_config.to_dict())

    # Environment and placement

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.quantizer.validate_environment(*args, **kwargs)
        if self._load is not None:
            self._load.device_map = kwargs.get("device_map")

    def update_device_map(self, device_map: Any) -> Any:
        return self.quantizer.update_device_map(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return self.quantizer.update_dtype(dtype)

    def update_attn_implementation(self, config: Any) -> Any:
        return self.quantizer.update_attn_implementation(config)

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return self.quantizer.adjust_max_memory(max_memory)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes an element of a parameter will take; not a whole number for codes that share bytes."""
        bits = None if self._load is None else self._load.bits_per_weight(param_name)
        return float(param.element_size()) if bits is None else bits / 8

    # Loading

    def preprocess_model(
        self, model: nn.Module, dtype: Any = None, device_map: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        kind: type[StoredLoad | QuantizingLoad | CalibratingLoad] = StoredLoad if self.pre_quantized else QuantizingLoad
        if calibrates(self.quantizer):
            kind = CalibratingLoad
        files = [Path(file) for file in checkpoint_files or ()]
        self._load = kind(self.quantizer, model, files, dtype, device_map)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """transformers' conversions and one of ours; quantized layers take their places here, by the final names."""
        assert self._load is not None
        conversions = self._load.begin(weight_conversions)
        self._load.model.quantization_method = SERVED  # type: ignore[assignment]
        plugins().notify("quantcore_before_weight_loading", quantizer=self.quantizer, model=self._load.model)
        if self.split is not None:
            self.split.take(self._load.model, *self._load.weights())
        return conversions

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return isinstance(self._load, QuantizingLoad) and self._load.takes(param_name)

    def get_quantize_ops(self) -> Any:
        assert isinstance(self._load, QuantizingLoad)
        return self._load.operation

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        assert self._load is not None
        if self.split is None:
            refuse_untold(model)
        self._load.finish()
        self._load = None
        if self.split is not None:
            self.split.finish(model)
            self.split = None
        self.quantizer.postprocess_model(model)
        if hasattr(model, "hf_quantizer"):  # a config may ask for float weights
            model.hf_quantizer = self
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        plugins().notify("quantcore_after_weight_loading", quantizer=self.quantizer, model=model)

    # Saving, training, leaving

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any) -> tuple[dict[str, Tensor] | None, Any]:
        if next(parallel_layers(model), None) is not None:
            return self._whole_state_dict(model)
        tensors, metadata = self.quantizer.get_state_dict_and_metadata(model, *args)
        self._describe(model)
        return (offloaded_state_dict(model) if tensors is None else tensors), metadata

    def _whole_state_dict(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """As `get_state_dict_and_metadata`, with whole layers on the first process, which writes."""
        with whole_layers(model):
            metadata: dict[str, str] = {}
            if distributed.get_rank() == 0:
                metadata = self.quantizer.get_state_dict_and_metadata(model)[1]
                self._describe(model)
            return {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}, metadata

    def _describe(self, model: nn.Module) -> None:
        """Have the model's config say of the layers what the method says; transformers writes it next."""
        if not isinstance(self.quantizer, WeightQuantizer):
            return
        described = self.quantizer.checkpoint_config(list(stored_layers(model, name_in_checkpoint(model))))
        config = self.quantizer.quantization_config
        usual = config.to_dict()
        of_layers = described.pop("quantization_config", {}).items()
        config.update(**{key: value for key, value in of_layers if key not in usual or usual[key] != value})
        for key, value in described.items():
            setattr(model.config, key, value)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return self.quantizer.is_serializable()

    @property
    def is_trainable(self) -> bool:
        return self.quantizer.is_trainable

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantizer.is_qat_trainable

    @property
    def is_compileable(self) -> bool:
        return self.quantizer.is_compileable

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with float weights in dtype (None: that of its other floats, whatever its config says)."""
        return self.quantizer.dequantize(model, as_dtype(dtype, "dtype"))

    def remove_quantization_config(self, model: nn.Module) -> None:
        self.quantizer.remove_quantization_config(model)


def choose(config: Any, requested: Any, takes: Callable[[str], bool]) -> ServedQuantizer | None:
    """The quantizer for a model config and what the caller passed as quantization_config; None leaves it to stock.

    takes: whether quantcore serves a method. Raises ValueError or ImportError naming the method when neither it nor
    transformers does: transformers itself would load the packed integers as if they were weights.
    """
    found = _found_in(config)
    requested = {"quant_method": requested} if isinstance(requested, str) else requested
    source = requested if found is None else found
    if source is None:
        return None
    folder = _folder_of(config)
    with told_with_place(folder, vars(config)) if found and folder.name else contextlib.nullcontext():
        quantizer = _quantizer_of(source, found, requested, takes)
    if quantizer is None:
        return None
    if not isinstance(quantizer, WeightQuantizer) and found is None:
        raise TypeError(f"{type(quantizer).__name__} only loads checkpoints; it cannot quantize a model")
    if calibrates(quantizer):
        check_data(quantizer)
    served = ServedQuantizer(quantizer, None if found or isinstance(requested, dict) else requested)
    config.quantization_config = served.quantization_config
    return served


def shown_to_transformers(quantizer: HfQuantizer, model: nn.Module) -> ServedQuantizer:
    """What a transformers model carries as `hf_quantizer`, so that its own save_pretrained and dequantize work."""
    model.quantization_method = SERVED  # type: ignore[assignment]
    count_float_weights(model)
    return ServedQuantizer(quantizer)


def _found_in(config: Any) -> Any:
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(inside.text_config(config, decoder=True), "quantization_config", None)
    folder = _folder_of(config)
    return quantization_beside(folder) if found is None and folder.name and folder.is_dir() else found


def _folder_of(config: Any) -> Path:
    return Path(getattr(config, inside.NAME_OR_PATH, None) or "")


def _quantizer_of(source: Any, found: Any, requested: Any, takes: Callable[[str], bool]) -> HfQuantizer | None:
    """The quantizer that a checkpoint, or else the caller, asks for; None where it is left to stock."""
    method = method_of(source if isinstance(source, Mapping) else source.to_dict())
    if not takes(method):
        _check_stock(method, source)
        return None
    merged = AutoHfQuantizer.merge_quantization_configs(found, requested and as_config(requested)) if found else source
    return AutoHfQuantizer.from_config(merged, pre_quantized=found is not None)


def _check_stock(method: str, source: Any) -> None:
    """Raise what says how to get a method that transformers does not know, or a config that only quantcore reads."""
    names = {name.removesuffix("_4bit").removesuffix("_8bit") for name in stock.AUTO_QUANTIZATION_CONFIG_MAPPING}
    if method not in names:
        config_class(method)
        raise ValueError(
            f"method {method!r} is known to quantcore alone and was not switched on; add it to "
            "quantcore.integrations.transformers.use(methods=[...])"
        )
    if isinstance(source, QuantizationConfigMixin):
        raise ValueError(
            f"a {type(source).__name__} of quantcore was passed, but {method!r} is left to transformers here; "
            "add it to use(methods=[...]), or pass transformers' own config"
        )
