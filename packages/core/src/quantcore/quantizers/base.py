"""The quantizer interface: every hook by the name under which transformers calls it, usable on any nn.Module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantcore import transformers_names as inside
from quantcore.errors import MissingExtraError
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers import selection
from quantcore.quantizers.hook_rules import check_overrides


class HfQuantizer:
    """Drives a model through load, quantize, save and dequantize for one config.

    Order of calls around a load: validate_environment, update_device_map, update_dtype, preprocess_model (which calls
    _process_model_before_weight_loading), the weights, postprocess_model (which calls
    _process_model_after_weight_loading).

    A subclass that overrides a hook which nothing calls is refused with an `UncalledHookError` when it is defined.
    """

    requires_calibration: bool = False
    serialized_names: Mapping[str, list[str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overrides(cls)

    def __init__(self, quantization_config: QuantizationConfigMixin, pre_quantized: bool = True, **kwargs: Any) -> None:
        self.quantization_config = quantization_config
        self.pre_quantized = pre_quantized
        if self.requires_calibration and not pre_quantized:
            raise ValueError(
                f"{self._method()} quantizes with calibration data; give some, or load a quantized checkpoint"
            )

    # Environment and placement

    def validate_environment(self, *args: Any, device_map: Any = None, weights_only: Any = None, **kwargs: Any) -> None:
        """Raise when this machine lacks what the method needs, such as `required_packages`. May be called twice."""
        missing = [package for package in self.required_packages or () if find_spec(package) is None]
        if missing:
            raise MissingExtraError(f"{self._method()} needs {', '.join(missing)}; pip install {' '.join(missing)}")

    def update_device_map(self, device_map: Any) -> Any:
        """The device map to use for the user's, which may be None or a string."""
        return device_map

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of what stays unquantized; may force or refuse one."""
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        return config

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Memory limits per device for a string device map."""
        return max_memory

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per element of a quantized weight, where one number says it."""
        return None

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        return float(param.element_size())

    # Loading

    def preprocess_model(
        self, model: nn.Module, dtype: torch.dtype | None = None, device_map: Any = None, **kwargs: Any
    ) -> nn.Module:
        """Put the modules in place that the weights are loaded into. The model may be on the meta device."""
        model.is_quantized = True  # type: ignore[assignment]
        model.quantization_method = self.quantization_config.quant_method  # type: ignore[assignment]
        if self.pre_quantized:
            self._convert_model_for_quantization(model)
        self._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        for name in ("tp_plan", "ep_plan"):
            plan = getattr(model, name, None)
            if isinstance(plan, dict):
                self.update_parallel_plan(model, plan)
        return model

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Finish the model after its weights are in place, and leave the config on it for saving."""
        held: Any = plugins().hook.quantcore_held_quantizer(quantizer=self, model=model)
        model.hf_quantizer = self if held is None else held  # type: ignore[assignment]
        if self.pre_quantized and getattr(self.quantization_config, "dequantize", False):
            self.remove_quantization_config(model)
        else:
            for config in _transformers_configs([model]):
                config.quantization_config = self.quantization_config
            for config in _transformers_configs(model.modules()):
                config._is_quantized = True
        self._process_model_after_weight_loading(model, **kwargs)
        return model

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Replace modules; called with the model on the meta device."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Finish modules; called with every weight in place."""

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Swap modules whose fused form cannot hold a pre-quantized checkpoint."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a float parameter is to be quantized while it loads."""
        return False

    def get_quantize_ops(self) -> Any:
        raise NotImplementedError(f"{self._method()} has no op that quantizes one parameter during a load")

    def get_load_operations(self) -> dict[str, Any]:
        return {}

    def get_weight_conversions(self) -> list[Any]:
        return []

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        return weight_conversions + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast a checkpoint tensor to, None to keep it; what an op of a quantizer reads is kept."""
        ours = any(getattr(operation, "hf_quantizer", None) for operation in getattr(converter, "operations", ()))
        return dtype if param.is_floating_point() and not ours else None

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
        """Give the companions of a weight, such as its scales, the placement of the weight."""
        for name, style in list(plan.items()):
            weight = next((suffix for suffix in self.serialized_names if name.endswith("." + suffix)), None)
            for companion in self.serialized_names.get(weight, ()) if weight else ():
                plan.setdefault(f"{name.removesuffix(weight or '')}{companion}", style)
        return plan

    # Saving, training, leaving

    def get_state_dict_and_metadata(
        self, model: nn.Module, *args: Any
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors to save (None: the model's own state dict) and metadata for the file header."""
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_qat_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return False

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """The model with float weights again, every trace of quantization removed."""
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        raise NotImplementedError(f"{self._method()} cannot dequantize a model")

    def remove_quantization_config(self, model: nn.Module) -> None:
        """Delete what marks a model as quantized."""
        for attribute in ("hf_quantizer", "quantization_method", inside.CONVERSIONS_OF_LOAD):
            model.__dict__.pop(attribute, None)
        for module in model.modules():
            vars(module).pop(inside.COUNT, None)
        model.is_quantized = False  # type: ignore[assignment]
        for config in _transformers_configs(model.modules()):
            vars(config).pop("quantization_config", None)
            vars(config).pop("_is_quantized", None)

    @staticmethod
    def get_modules_to_not_convert(
        model: nn.Module,
        skip_modules: list[str] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        add_default_skips: bool = False,
    ) -> list[str]:
        """Patterns of modules that stay float: the given list, or the automatic one, plus what must stay in float32."""
        given = list(skip_modules or ())
        automatic = selection.default_skips(model) + list(selection.tied_modules(model))
        use_automatic = skip_modules is None or add_default_skips
        return list(dict.fromkeys((automatic if use_automatic else []) + given + list(keep_in_fp32_modules or ())))

    # Names of transformers 4.x. `update_torch_dtype` may be overridden; of the others see `hook_rules`

    required_packages: ClassVar[list[str] | None] = None
    requires_parameters_quantization: bool = False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        return self.update_dtype(torch_dtype)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        return torch_dtype

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return missing_keys

    def update_missing_keys_after_loading(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return missing_keys

    def update_expected_keys(self, model: nn.Module, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        return expected_keys

    def update_unexpected_keys(self, model: nn.Module, unexpected_keys: list[str], prefix: str = "") -> list[str]:
        return unexpected_keys

    def check_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        return self.param_needs_quantization(model, param_name, **kwargs)

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{self._method()} does not create parameters one by one; use quantcore.quantize or load"
        )

    def get_param_name(self, param_name: str) -> str:
        return self.update_param_name(param_name)

    def update_param_name(self, param_name: str) -> str:
        return param_name

    def get_cuda_warm_up_factor(self) -> int:
        return self.get_accelerator_warm_up_factor()

    def get_accelerator_warm_up_factor(self) -> int:
        """Divisor of what is reserved before a load: 4 reserves half of the float16 size."""
        return 4

    def update_tp_plan(self, config: Any) -> Any:
        return config

    def update_ep_plan(self, config: Any) -> Any:
        return config

    def update_state_dict_with_metadata(
        self, state_dict: dict[str, Tensor], metadata: Mapping[str, str]
    ) -> dict[str, Tensor]:
        return state_dict

    def _method(self) -> str:
        method = self.quantization_config.quant_method
        return str(getattr(method, "value", method))


def _transformers_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """What transformers' models call `config`; an attribute of that name may be anything elsewhere."""
    found = (getattr(module, "config", None) for module in modules)
    return [config for config in found if hasattr(config, "to_json_string")]
