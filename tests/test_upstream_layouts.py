"""Checkpoints as they are published: tensors that transformers joins, cuts, turns and renames when it loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcore
from quantcore.errors import CheckpointError
from quantcore.integrations.transformers import use

INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def aria_text() -> Any:
    config = transformers.AriaTextConfig(**TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    return transformers.AriaTextForCausalLM(config)


def aria() -> Any:
    text = {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = transformers.AriaConfig(text_config=text, vision_config=VISION)
    return transformers.AriaForConditionalGeneration(config)


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TEXT, num_local_experts=12))


def nomic_bert() -> Any:
    return transformers.NomicBertModel(transformers.NomicBertConfig(**ENCODER))


def olmo_hybrid() -> Any:
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**TEXT, **LINEAR))


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TEXT), vision_config=vision)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": SECTIONS}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def ernie_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "patch_size": 14}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [32, 16]}
    text = {**TEXT, **experts, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": SECTIONS}
    config = transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def qwen3_vl_moe() -> Any:
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 16}
    text = {**TEXT, **experts, "rope_parameters": SECTIONS}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def filled(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = build().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def turned(folder: Path) -> None:
    """The 3-D weights of experts the other way, as their makers published them."""
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if "mlp.experts." in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})


def as_saved(folder: Path) -> None:
    """Nothing: save_pretrained writes what its makers published."""


CASES: dict[str, tuple[Callable[[], Any], Callable[[Path], None]]] = {
    "renamed": (aria_text, as_saved),
    "renamed in a part": (aria, as_saved),
    "experts": (mixtral, as_saved),
    "cut": (nomic_bert, as_saved),
    "joined": (olmo_hybrid, as_saved),
    "old names": (llava, as_saved),
    "prefix": (qwen2_vl, as_saved),
    "experts of two kinds": (ernie_vl, as_saved),
    "turned": (qwen3_vl_moe, turned),
}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]


@pytest.mark.parametrize("case", CASES)
def test_published_layout_loads_and_quantizes_as_transformers_loads_it(case: str, tmp_path: Path) -> None:
    build, published = CASES[case]
    model = filled(build)
    model.save_pretrained(tmp_path / "float")
    published(tmp_path / "float")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    own = model.state_dict()
    assert any(name not in own or tensor.shape != own[name].shape for name, tensor in stored.items())

    theirs = type(model).from_pretrained(tmp_path / "float")
    assert differing(theirs.state_dict(), own) == []
    assert differing(quantcore.load(tmp_path / "float").state_dict(), own) == []

    quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", INT8)
    expected = quantcore.quantize(theirs, INT8).state_dict()
    assert differing(quantcore.load(tmp_path / "quantized").state_dict(), expected) == []
    with use():
        served = type(model).from_pretrained(tmp_path / "quantized")
    assert differing(served.state_dict(), expected) == []


def test_tensor_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    filled(nomic_bert).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "Wqkv" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"v_proj.weight: expected"):
        quantcore.load(tmp_path)


def test_base_model_and_whole_model_read_each_others_checkpoints(tmp_path: Path) -> None:
    whole = filled(mixtral)
    whole.save_pretrained(tmp_path / "whole")
    whole.model.save_pretrained(tmp_path / "base")
    base = quantcore.load(tmp_path / "base", lambda: transformers.MixtralModel(whole.config))
    assert differing(base.state_dict(), whole.model.state_dict()) == []
