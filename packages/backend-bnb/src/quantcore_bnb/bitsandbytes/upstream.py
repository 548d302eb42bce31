"""Layers of the bitsandbytes package itself, for measuring beside ours. Nothing else here needs that package."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from quantcore.sdk import MissingExtraError
from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig


def linear(dense: nn.Linear, config: BitsAndBytesConfig) -> nn.Module:
    """What bitsandbytes makes of a float layer without bias under a config, on the layer's device.

    Raises MissingExtraError when bitsandbytes is not installed.
    """
    try:
        modules = importlib.import_module("bitsandbytes.nn")
    except ModuleNotFoundError as error:
        raise MissingExtraError("this compares with bitsandbytes itself; pip install bitsandbytes") from error
    device, weight = dense.weight.device, dense.weight.detach().clone()
    shape = (dense.in_features, dense.out_features)
    if config.load_in_8bit:
        layer = modules.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=config.llm_int8_threshold)
        layer.weight = modules.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    else:
        options: dict[str, Any] = {
            "quant_type": config.bnb_4bit_quant_type,
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_storage": config.bnb_4bit_quant_storage,
        }
        layer = modules.Linear4bit(*shape, bias=False, compute_dtype=config.bnb_4bit_compute_dtype, **options)
        layer.weight = modules.Params4bit(weight, requires_grad=False, **options)
    moved: nn.Module = layer.to(device)  # which quantizes
    return moved
