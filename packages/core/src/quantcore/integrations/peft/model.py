"""Adapters on a whole quantized model: adding, loading, preparing for training, merging."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quantcore._optional import require
from quantcore.nn.dense import view_dense
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.model import dequantize

logger = logging.getLogger(__name__)

_ALL_LINEAR = "all-linear"
_NOT_ON_EXPERTS = ("use_dora", "lora_dropout", "lora_bias", "fan_in_fan_out")


def register(config: Any, model: nn.Module | None = None) -> Any:
    """The LoraConfig, made to know quantized modules, for PEFT's own get_peft_model and add_adapter.

    model: the one that target_modules="all-linear" stands for; PEFT itself finds only float layers. The 3-D weights of
    quantized experts are among all, unless the config has options that PEFT does not have for 3-D weights. For those
    weights use the functions of this module: PEFT's own do not see them.
    Raises TypeError for a config of another kind of adapter, ValueError when modules_to_save names quantized modules.
    """
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"adapters on quantized layers are LoRA or DoRA; got a {type(config).__name__}")
    from quantcore.integrations.peft.experts import LoraQuantizedExperts
    from quantcore.integrations.peft.layer import LoraQuantizedEmbedding, LoraQuantizedLinear

    config._register_custom_module(
        {
            QuantizedLinear: LoraQuantizedLinear,
            QuantizedEmbedding: LoraQuantizedEmbedding,
            QuantizedExperts: LoraQuantizedExperts,
        }
    )
    if model is not None:
        _check_saved_modules(config, model)
        if str(config.target_modules).lower() == _ALL_LINEAR:
            _target_all(config, model)
    return config


def get_peft_model(model: nn.Module, config: Any, **options: Any) -> Any:
    """PEFT's get_peft_model, on quantized and float modules alike. options: PEFT's own.

    A warning tells how many quantized layers got no adapter though all were asked for.
    """
    takes_all = str(getattr(config, "target_modules", "")).lower() == _ALL_LINEAR
    with _shown_experts(model, register(config, model)):
        adapted = _peft().get_peft_model(model, config, **options)
    if takes_all:
        _warn_of_left_layers(adapted)
    return adapted


def add_adapter(model: Any, adapter_name: str, config: Any, **options: Any) -> None:
    """PEFT's add_adapter on a PeftModel with quantized modules: one more adapter. options: PEFT's own."""
    with _shown_experts(model, register(config, model)):
        model.add_adapter(adapter_name, config, **options)


def load_adapter(model: nn.Module, path: str | os.PathLike[str], **options: Any) -> Any:
    """PEFT's PeftModel.from_pretrained on a quantized model: the model with a saved adapter. options: PEFT's own."""
    peft = _peft()
    config = options.pop("config", None) or peft.PeftConfig.from_pretrained(path)
    with _shown_experts(model, register(config, model)):
        return peft.PeftModel.from_pretrained(model, path, config=config, **options)


def prepare_model_for_kbit_training(model: nn.Module, **options: Any) -> nn.Module:
    """PEFT's function of this name: frozen weights, float32 norms, gradient checkpointing. Stored tensors stay as read.

    PEFT's own casts every float16 and bfloat16 parameter, of which some hold packed bits.
    """
    with _hidden_stored_tensors(model):
        prepared: nn.Module = _peft().prepare_model_for_kbit_training(model, **options)
    if options.get("use_gradient_checkpointing", True) and hasattr(prepared, "gradient_checkpointing_enable"):
        _enable_checkpointing(
            prepared, {"use_reentrant": False, **(options.get("gradient_checkpointing_kwargs") or {})}
        )
    return prepared


def merge_errors(model: nn.Module) -> dict[str, float]:
    """What merging added to the error of each quantized weight, relative to the one that was wanted, by name."""
    return {name: layer.merge_error for name, layer in _adapted(model) if layer.merge_error is not None}


def merge_to_float(model: Any, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None) -> nn.Module:
    """The base model with adapters merged and every weight float again: what merging loses least in.

    model: a PeftModel. dtype: of all weights; None for bfloat16. Layer by layer: peak memory is the result, plus the
    quantized layers that are still to come. adapter_names: None for the active ones.
    """
    from quantcore.integrations.peft.experts import merge_experts_to_float
    from quantcore.integrations.peft.merging import Requantizing

    dtype = dtype or torch.bfloat16
    model.unmerge_adapter()
    for layer in [layer for _, layer in _adapted(model) if isinstance(layer, Requantizing)]:
        layer.base_layer = layer.float_base(dtype, adapter_names)
        layer.merged_adapters += layer.active_adapters
    merge_experts_to_float(model, dtype, adapter_names)
    for _, layer in list(_float_lora_layers(model)):
        layer.merge(adapter_names=adapter_names)
    plain: nn.Module = model.unload()
    if next(quantized_modules(plain), None) is not None or getattr(plain, "hf_quantizer", None) is not None:
        plain = dequantize(plain, dtype)
    return plain.to(dtype)


def _float_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            yield name, module


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer over a quantized weight, by the name of what it adapts."""
    from quantcore.integrations.peft.experts import LoraQuantizedExperts
    from quantcore.integrations.peft.merging import Requantizing

    for name, module in model.named_modules():
        if isinstance(module, Requantizing):
            yield name, module
        elif isinstance(module, LoraQuantizedExperts):  # one around the other
            yield f"{name.replace('.base_layer', '')}.{module.parameter_name}", module


def _check_saved_modules(config: Any, model: nn.Module) -> None:
    """PEFT trains copies of these, and a quantized weight cannot be trained."""
    wanted = {f".{name}" for name in config.modules_to_save or ()}
    found = [name for name, _ in quantized_modules(model) if any(f"{module}." in f".{name}." for module in wanted)]
    if found:
        raise ValueError(
            f"modules_to_save names quantized modules, which cannot be trained: {_few(found)}; name them in "
            "target_modules instead, or leave them float when quantizing"
        )


def _target_all(config: Any, model: Any) -> None:
    """Name every linear layer in a config, and every 3-D weight of experts where it can have adapters."""
    config.target_modules = _linear_names(model)
    if _fits_experts(config):
        experts = _experts(model.get_base_model() if hasattr(model, "get_base_model") else model)
        names = [f"{name.replace('.base_layer', '')}.{weight.name}" for name, each in experts for weight in each.fused]
        config.target_parameters = [*(config.target_parameters or []), *names] or None


def _fits_experts(config: Any) -> bool:
    """Whether PEFT can put such adapters on 3-D weights."""
    return not any(getattr(config, option, None) for option in _NOT_ON_EXPERTS)


@contextlib.contextmanager
def _shown_experts(model: nn.Module, config: Any) -> Iterator[None]:
    """A block in which quantized experts show PEFT their 3-D weights among their parameters, without values."""
    from quantcore.integrations.peft.experts import placeholder

    experts = [module for _, module in _experts(model)]
    if experts and not _fits_experts(config):
        logger.warning("experts get no adapters: PEFT has none for 3-D weights with %s", ", ".join(_NOT_ON_EXPERTS))
        experts = []
    for module in experts:
        for weight in module.fused:
            module._parameters[weight.name] = nn.Parameter(placeholder(module, weight), requires_grad=False)
    try:
        yield
    finally:
        for module in experts:
            for weight in module.fused:
                del module._parameters[weight.name]


def _experts(model: nn.Module) -> Iterator[tuple[str, QuantizedExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            yield name, module


def _warn_of_left_layers(model: nn.Module) -> None:
    layers = {
        id(module): name for name, module in quantized_modules(model) if not isinstance(module, QuantizedEmbedding)
    }
    adapted = {id(base) for _, layer in _adapted(model) for base in layer.bases()}
    left = [name.removeprefix("base_model.model.") for number, name in layers.items() if number not in adapted]
    if left:
        logger.warning("%d of %d quantized layers got no adapter: %s", len(left), len(layers), _few(left))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _linear_names(model: Any) -> list[str]:
    """Every linear layer, quantized or float, with adapters or without, but the output head and those of experts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names: list[str] = []
    inside: tuple[str, ...] = ()  # what lies in a layer with adapters is a part of it, and so it is with experts
    for name, module in base.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        is_linear = isinstance(layer, QuantizedLinear) or view_dense(layer) is not None
        if is_linear and layer is not head and not name.startswith(inside):
            names.append(name)
        if layer is not module or isinstance(module, QuantizedExperts):
            inside += (f"{name}.",)
    return names


@contextlib.contextmanager
def _hidden_stored_tensors(model: nn.Module) -> Iterator[None]:
    """A block in which quantized layers show no stored tensors among their parameters."""
    taken = []
    for _, module in quantized_modules(model):
        attributes = [name for name in module._parameters if name in module.weight_attributes]
        taken.append((module, {attribute: module._parameters.pop(attribute) for attribute in attributes}))
    try:
        yield
    finally:
        for module, parameters in taken:
            module._parameters = {**parameters, **module._parameters}


def _enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """What PEFT does only for the methods that it knows by name."""
    if options["use_reentrant"] and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _peft() -> Any:
    return require("peft", "peft")
