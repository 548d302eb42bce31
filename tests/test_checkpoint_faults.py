"""Checkpoints that say one thing and hold another, and what must not be lost on the way through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore.errors import CheckpointError, LossyConversionError

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(3, 15)[None]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "pad_token_id": 0,
}
CALIBRATION: dict[str, Any] = {"calibration": [TOKENS]}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    model: nn.Module = transformers.LlamaForCausalLM(config).float().eval()
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensor(folder: Path, suffix: str, value: float) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(suffix))
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, {"format": "pt"})
    return name


def load_by(way: str, folder: Path) -> nn.Module:
    if way == "load":
        return quantcore.load(folder, dtype=torch.float32)
    from quantcore.integrations.transformers import use

    with use():
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


BOTH_WAYS = pytest.mark.parametrize("way", ["load", "from_pretrained"])

# Values

HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 64}


@BOTH_WAYS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_named_with_its_count(tmp_path: Path, way: str, value: float) -> None:
    quantcore.save(quantcore.quantize(llama(), dict(HQQ)), tmp_path / "q")
    name = change_tensor(tmp_path / "q", ".scale", value)
    with pytest.raises(CheckpointError, match=rf"{name}: 1 of \d+ values are NaN or infinite"):
        load_by(way, tmp_path / "q")


def test_convert_refuses_what_load_refuses(tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(llama(), dict(HQQ)), tmp_path / "q")
    name = change_tensor(tmp_path / "q", ".scale", float("nan"))
    with pytest.raises(CheckpointError, match=f"{name}: 1 of"):
        quantcore.convert(tmp_path / "q", tmp_path / "float", None)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_setting_reads_such_scales_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantcore.save(quantcore.quantize(llama(), dict(HQQ)), tmp_path / "q")
    change_tensor(tmp_path / "q", ".scale", float("nan"))
    monkeypatch.setenv("QUANTCORE_ALLOW_NON_FINITE", "1")
    assert quantcore.load(tmp_path / "q").hf_quantizer is not None


# Ties


@BOTH_WAYS
@pytest.mark.parametrize(
    "config", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}, HQQ | {"skip_modules": []}]
)
def test_a_head_stored_apart_is_kept_whatever_the_flag_says(
    tmp_path: Path, way: str, config: dict[str, Any] | None
) -> None:
    model = llama() if config is None else quantcore.quantize(llama(), dict(config))
    quantcore.save(model, tmp_path / "m")
    change_config(tmp_path / "m", tie_word_embeddings=True)
    assert torch.equal(logits(load_by(way, tmp_path / "m")), logits(model))


def test_a_model_untied_by_its_file_is_saved_untied(tmp_path: Path) -> None:
    model = llama()
    quantcore.save(model, tmp_path / "m")
    change_config(tmp_path / "m", tie_word_embeddings=True)
    quantcore.save(quantcore.load(tmp_path / "m"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(quantcore.load(tmp_path / "again")), logits(model))


def test_a_head_stored_twice_alike_stays_tied(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)  # type: ignore[union-attr]
    quantcore.save(model, tmp_path / "m")
    change_config(tmp_path / "m", tie_word_embeddings=True)
    loaded: Any = quantcore.load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# Beside the layers


@pytest.fixture
def divided(tmp_path: Path) -> Path:
    """A checkpoint of AWQ whose activations are divided before the second layer of each MLP."""
    torch.manual_seed(0)
    model = transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SIZES)).float().eval()
    quantcore.save(
        quantcore.quantize(model, {"quant_method": "awq", "bits": 4, "group_size": 32}, **CALIBRATION), tmp_path / "awq"
    )
    assert any(name.endswith("act.scales") for name in load_file(tmp_path / "awq" / "model.safetensors"))
    return tmp_path / "awq"


def test_scales_of_activations_are_put_into_float_weights(divided: Path, tmp_path: Path) -> None:
    expected = logits(quantcore.load(divided, dtype=torch.float32))
    quantcore.convert(divided, tmp_path / "float", None, dtype="float32")
    found = logits(quantcore.load(tmp_path / "float"))
    assert (found - expected).norm() / expected.norm() < 1e-5  # a division in another place


def test_scales_of_activations_stop_a_conversion_that_would_lose_them(divided: Path, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    with pytest.raises(LossyConversionError, match=r"c_proj: its input is divided by .*act\.scales"):
        quantcore.convert(divided, tmp_path / "gptq", config)
    done = quantcore.convert(divided, tmp_path / "gptq", config, allow_lossy=True)
    assert len(done.lossy) == 2
    assert not any("act.scales" in name for name in load_file(tmp_path / "gptq" / "model.safetensors"))


def test_scales_of_a_cache_are_left_out_with_a_word(tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(llama(), {"quant_method": "fp8", "weight_block_size": [32, 32]}), tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    scale = "model.layers.0.self_attn.k_scale"
    save_file(load_file(path) | {scale: torch.tensor(0.004)}, path, {"format": "pt"})
    done = quantcore.convert(tmp_path / "q", tmp_path / "float", None)
    assert done.dropped == [scale]
    assert scale not in load_file(tmp_path / "float" / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5], ids=str)
def test_scale_of_a_cache_that_cannot_be_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    quantcore.save(quantcore.quantize(llama(), {"quant_method": "fp8", "weight_block_size": [32, 32]}), tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    scales = {
        f"model.layers.0.self_attn.{side}_scale": torch.tensor([number]) for side, number in (("k", value), ("v", 1.0))
    }
    save_file(load_file(path) | scales, path, {"format": "pt"})
    said = r"1 tensors hold values that cannot be.*\n.*self_attn\.k_scale: 1 of 1 values are NaN, infinite or negative"
    with pytest.raises(CheckpointError, match=said):
        quantcore.load(tmp_path / "q")
    monkeypatch.setenv("QUANTCORE_ALLOW_NON_FINITE", "1")
    quantcore.load(tmp_path / "q")


# What is saved


def test_a_model_with_adapters_is_refused_with_what_to_call(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from quantcore.integrations.peft import get_peft_model

    model = quantcore.quantize(llama(), {"quant_method": "bitsandbytes", "load_in_4bit": True})
    adapted = get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters are no part of a checkpoint; .*merge_and_unload"):
        quantcore.save(adapted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Names


def llava(folder: Path) -> Path:
    """A folder whose tensors have the names of the hub's LLaVA models, which are not those of the model."""
    config = transformers.LlavaConfig(
        text_config={**SIZES, "model_type": "llama"},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 32,
        },
        image_token_index=60,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


SKIPPED = ["vision_tower", "multi_modal_projector", "lm_head"]


@pytest.mark.parametrize("way", ["quantize", "quantize_checkpoint", "from_pretrained"])
@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": SKIPPED},
        {"quant_method": "mxfp8", "modules_to_not_convert": SKIPPED},
    ],
    ids=["bitsandbytes", "mxfp8"],
)
def test_a_skip_list_may_use_the_names_of_the_checkpoint(tmp_path: Path, way: str, config: dict[str, Any]) -> None:
    from quantcore.integrations.transformers import use

    folder, cls = llava(tmp_path / "float"), transformers.LlavaForConditionalGeneration
    if way == "quantize":
        model = quantcore.quantize(cls.from_pretrained(folder), dict(config))
    elif way == "quantize_checkpoint":
        quantcore.quantize_checkpoint(folder, tmp_path / "q", dict(config))
        model = quantcore.load(tmp_path / "q")
    else:
        with use():
            model = cls.from_pretrained(folder, quantization_config=dict(config))
    names = [name for name, module in model.named_modules() if isinstance(module, quantcore.nn.QuantizedLinear)]
    assert names
    assert not [name for name in names if "vision_tower" in name or "projector" in name]


def test_a_pattern_that_hits_a_container_alone_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="quantcore"):
        quantcore.quantize(llama(), {"quant_method": "mxfp8", "modules_to_not_convert": ["self_attn"]})
    assert "no layer matches the skip patterns ['self_attn']" in caplog.text
