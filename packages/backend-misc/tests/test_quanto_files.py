"""Activations that quanto measures: from file to file as in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantcore

transformers = pytest.importorskip("transformers")

CONFIG = {"quant_method": "quanto", "weights": "int8", "activations": "int8"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_scales_of_activations_are_the_same_from_file_to_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    data = torch.randint(0, 64, (4, 16))
    quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "files", CONFIG, calibration=data)
    in_memory = quantcore.quantize(quantcore.load(tmp_path / "float"), CONFIG, calibration=data)
    expected, found = in_memory.state_dict(), quantcore.load(tmp_path / "files").state_dict()
    assert {name for name in expected if name.endswith("q_proj.input_scale")} <= found.keys()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(float(scale) != 1 for name, scale in found.items() if name.endswith("q_proj.input_scale"))
