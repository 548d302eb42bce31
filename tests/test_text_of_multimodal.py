"""The text model of a multimodal checkpoint, opened and quantized alone, as transformers opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore
from quantcore.integrations.transformers import use

INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
IDS = torch.arange(2, 26).view(2, 12)
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
FIRST_LAYER = {
    "of the text model": "model.layers.0",
    "of the checkpoint": "model.language_model.layers.0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint, of which transformers opens the text model alone."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("multimodal") / "float"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    """The text model as transformers opens it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    return model


def text_model() -> nn.Module:
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**TEXT))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, quantcore.nn.QuantizedLinear)]


def int8_without(pattern: str) -> dict[str, Any]:
    return {**INT8, "llm_int8_skip_modules": ["lm_head", pattern]}


def opened(path: Path, way: str) -> Any:
    """The text model of a quantized folder."""
    if way == "load":
        return quantcore.load(path, text_model)
    with use():
        return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def test_load_gives_what_transformers_does(folder: Path, stock: Any) -> None:
    model = quantcore.load(folder, text_model)
    assert torch.equal(logits(model), logits(stock))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stock.state_dict().items())


@pytest.mark.parametrize("pattern", FIRST_LAYER.values(), ids=FIRST_LAYER)
def test_skip_lists_may_use_names_of_the_checkpoint_while_loading(folder: Path, stock: Any, pattern: str) -> None:
    with use():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=int8_without(pattern))
    expected = quantcore.quantize(quantcore.load(folder, text_model), int8_without(FIRST_LAYER["of the text model"]))
    assert quantized(model) == quantized(expected)
    assert not any(name.startswith("model.layers.0.") for name in quantized(model))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("pattern", FIRST_LAYER.values(), ids=FIRST_LAYER)
@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_a_text_model_is_written_alone_and_opens_by_itself(
    folder: Path, tmp_path: Path, pattern: str, way: str
) -> None:
    out = tmp_path / "out"
    quantcore.quantize_checkpoint(folder, out, int8_without(pattern), model=text_model)
    expected = quantcore.quantize(quantcore.load(folder, text_model), int8_without(FIRST_LAYER["of the text model"]))
    found = opened(out, way)
    assert quantized(found) == quantized(expected)
    assert torch.equal(logits(found), logits(expected))


def test_what_is_written_is_what_save_writes_of_the_loaded_model(folder: Path, tmp_path: Path) -> None:
    quantcore.quantize_checkpoint(folder, tmp_path / "files", dict(INT8), model=text_model)
    quantcore.save(quantcore.quantize(quantcore.load(folder, text_model), dict(INT8)), tmp_path / "saved")
    config, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("files", "saved"))
    assert config == saved
    assert config["architectures"] == ["Qwen3_5ForCausalLM"]
    tensors, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "saved"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_the_text_model_of_a_quantized_multimodal_folder(folder: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "whole"
    quantcore.quantize_checkpoint(folder, out, int8_without(FIRST_LAYER["of the checkpoint"]))
    whole, text = quantcore.load(out), opened(out, way)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    assert [f"model.language_model.{name.removeprefix('model.')}" for name in quantized(text)] == [
        name for name in quantized(whole) if "language_model" in name
    ]
    assert torch.equal(logits(text), logits(whole))
