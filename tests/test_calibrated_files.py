"""Calibrated quantization from file to file, of models of transformers: the files of the model quantized in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore.nn.replace import quantized_modules

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq-head": {"quant_method": "gptq", "bits": 4, "group_size": 32, "lm_head": True, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 4},
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "solver": "gptq",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
    "kv-cache": {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    },
}
IDS = torch.arange(4 * 12).view(4, 12).mul(7).remainder(90)


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder; of config.json what is said of the quantization."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files.pop("generation_config.json", None)
    return {**files, "config.json": json.loads(files["config.json"])["quantization_config"]}


def in_memory(source: Path, target: Path, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    model = quantcore.quantize(quantcore.load(source, **options), dict(config), calibration=IDS, batch_size=2)
    quantcore.save(model, target, max_shard_size="60KB")
    return contents(target)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_llama_gives_the_same_files(
    config: dict[str, Any], save_float: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_float("llama")
    quantcore.quantize_checkpoint(
        source, tmp_path / "made", dict(config), calibration=IDS, batch_size=2, max_shard_size="60KB"
    )
    assert contents(tmp_path / "made") == in_memory(source, tmp_path / "saved", config)


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round"])
def test_a_mixture_of_experts_gives_the_same_files(
    method: str, save_float: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_float("mixtral")
    quantcore.quantize_checkpoint(
        source, tmp_path / "made", dict(CONFIGS[method]), calibration=IDS, batch_size=2, max_shard_size="60KB"
    )
    assert contents(tmp_path / "made") == in_memory(source, tmp_path / "saved", CONFIGS[method])
    experts = [name for name, _ in quantized_modules(quantcore.load(tmp_path / "made")) if ".experts." in name]
    assert experts


def test_another_dtype_is_that_of_the_loaded_model(save_float: Callable[[str], Path], tmp_path: Path) -> None:
    source = save_float("llama")
    quantcore.quantize_checkpoint(
        source, tmp_path / "made", CONFIGS["gptq"], calibration=IDS, batch_size=2, dtype="bfloat16",
        max_shard_size="60KB",
    )  # fmt: skip
    assert contents(tmp_path / "made") == in_memory(source, tmp_path / "saved", CONFIGS["gptq"], dtype="bfloat16")
