"""What the methods gptq and awq save loads in stock gptqmodel and computes the same. Needs gptqmodel; run by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one or two cores it does not start otherwise

from gptqmodel import BACKEND, GPTQModel

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq-4": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq-4-v2-asymmetric": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"},
    "gptq-4-ordered": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "gptq-2": {"quant_method": "gptq", "bits": 2, "group_size": 64, "sym": False},
    "gptq-3": {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": False},
    "gptq-8-rows": {"quant_method": "gptq", "bits": 8, "group_size": -1},
    "gptq-6-planar": {"quant_method": "gptq", "bits": 6, "group_size": 32, "format": "gptq_p"},
    "gptq-mixed": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "lm_head": True,
        "dynamic": {r"-:model\.layers\.0\.mlp\.down_proj": {}, r".*v_proj": {"bits": 8, "group_size": 64}},
    },
    "awq-4": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "awq-4-symmetric": {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_stock_gptqmodel_computes_what_we_compute(
    config: dict[str, Any],
    save_quantized: Callable[[dict[str, Any]], Path],
    check_same_logits: Callable[[Any, Path], None],
) -> None:
    folder = save_quantized(config)
    backend = BACKEND.TORCH_AWQ if config["quant_method"] == "awq" else BACKEND.TORCH
    theirs = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
    check_same_logits(theirs.model, folder)
