"""What the method auto-round saves loads in stock transformers with auto-round. Needs both; run by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

METHOD = {"quant_method": "auto-round", "iters": 2, "nsamples": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "4": {**METHOD, "bits": 4, "group_size": 32},
    "4-asymmetric": {**METHOD, "bits": 4, "group_size": 32, "sym": False},
    "4-native": {**METHOD, "bits": 4, "group_size": 64, "sym": False, "packing_format": "auto_round"},
    "3-native": {**METHOD, "bits": 3, "group_size": 64, "sym": False},
    "2": {**METHOD, "bits": 2, "group_size": 32},
    "8-rows": {**METHOD, "bits": 8, "group_size": -1},
    "mixed": {
        **METHOD,
        "bits": 4,
        "group_size": 32,
        "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}, ".*v_proj": {"bits": 16}, "lm_head": {"bits": 4}},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stock_auto_round_computes_what_we_compute(
    config: dict[str, Any],
    save_quantized: Callable[[dict[str, Any]], Path],
    check_same_logits: Callable[[Any, Path], None],
) -> None:
    folder = save_quantized(config)
    check_same_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu"), folder)
