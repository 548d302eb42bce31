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
from quantcore.nn.dense import build_dense, view_dense
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.model import dequantize

logger = logging.getLogger(__name__)

_ALL_LINEAR = "all-linear"


def register(config: Any, model: nn.Module | None = None) -> Any:
    """The LoraConfig, made to know quantized layers, for PEFT's own get_peft_model and add_adapter.

    model: the one that target_modules="all-linear" stands for; PEFT itself finds only float layers.
    Raises TypeError for a config of another kind of adapter.
    """
    peft = _peft()
    if not isinstance(config, peft.LoraConfig):
        raise TypeError(f"adapters on quantized layers are LoRA or DoRA; got a {type(config).__name__}")
    from quantcore.integrations.peft.layer import LoraQuantizedLinear

    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    if model is not None and str(config.target_modules).lower() == _ALL_LINEAR:
        config.target_modules = _linear_names(model)
    return config


def get_peft_model(model: nn.Module, config: Any, **options: Any) -> Any:
    """PEFT's get_peft_model, on quantized and float layers alike. options: PEFT's own.

    PEFT looks for the experts of some architectures in fused parameters, which quantized ones do not have: a warning
    tells how many layers got no adapter.
    """
    from quantcore.integrations.peft.layer import lora_layers

    takes_all = str(getattr(config, "target_modules", "")).lower() == _ALL_LINEAR
    wanted = sum(isinstance(module, QuantizedLinear) for module in model.modules()) if takes_all else 0
    adapted = _peft().get_peft_model(model, register(config, model), **options)
    left = wanted - sum(1 for _ in lora_layers(adapted))
    if left > 0:
        logger.warning("%d of %d quantized layers got no adapter: experts, or the output head", left, wanted)
    return adapted


def load_adapter(model: nn.Module, path: str | os.PathLike[str], **options: Any) -> Any:
    """PEFT's PeftModel.from_pretrained on a quantized model: the model with a saved adapter. options: PEFT's own."""
    peft = _peft()
    config = options.pop("config", None) or peft.PeftConfig.from_pretrained(path)
    return peft.PeftModel.from_pretrained(model, path, config=register(config, model), **options)


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
    """What merging added to the error of each quantized layer, relative to the weight that was wanted, by name."""
    from quantcore.integrations.peft.layer import lora_layers

    return {name: layer.merge_error for name, layer in lora_layers(model) if layer.merge_error is not None}


def merge_to_float(model: Any, dtype: torch.dtype | None = None, adapter_names: list[str] | None = None) -> nn.Module:
    """The base model with adapters merged and every weight float again: what merging loses least in.

    model: a PeftModel. dtype: of all weights; None for bfloat16. Layer by layer: peak memory is the result, plus the
    quantized layers that are still to come. adapter_names: None for the active ones.
    """
    from quantcore.integrations.peft.layer import lora_layers

    dtype = dtype or torch.bfloat16
    model.unmerge_adapter()
    for _, layer in list(lora_layers(model)):
        weight, bias = layer.merged_weight(adapter_names)
        base = layer.get_base_layer()
        layer.base_layer = build_dense(base.dense_type, weight.to(dtype), None if bias is None else bias.to(dtype))
        layer.merged_adapters += list(layer.active_adapters)
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


def _linear_names(model: Any) -> list[str]:
    """Every linear layer, quantized or float, with adapters or without, but the output head."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names: list[str] = []
    inside: tuple[str, ...] = ()  # what lies in a layer with adapters is a part of it
    for name, module in base.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        is_linear = isinstance(layer, QuantizedLinear) or view_dense(layer) is not None
        if is_linear and layer is not head and not name.startswith(inside):
            names.append(name)
        if layer is not module:
            inside += (f"{name}.",)
    return names


@contextlib.contextmanager
def _hidden_stored_tensors(model: nn.Module) -> Iterator[None]:
    """A block in which quantized layers show no stored tensors among their parameters."""
    taken = []
    for _, module in quantized_modules(model):
        attributes = list(module._attributes.values())
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
