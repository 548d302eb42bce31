"""Routers that old tools quantized with the other layers: they load as the floats that today's models multiply."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore.errors import CheckpointError
from quantcore.integrations.transformers import use
from quantcore.nn import QuantizedLinear

IDS = torch.arange(3, 15)[None]
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 32], "modules_to_not_convert": ["lm_head"]},
}
ROUTER = "model.layers.0.mlp.gate"


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def float_model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32}
    parts = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "first_k_dense_replace": 0}
    experts = {"n_routed_experts": 32, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1}
    settings: dict[str, Any] = {**sizes, **heads, **parts, **experts}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**settings)).float().eval()
    with torch.no_grad():
        model.get_parameter(f"{ROUTER}.weight").normal_()
        model.get_buffer(f"{ROUTER}.e_score_correction_bias").normal_(0, 0.1)
    return model


def stored_router(config: dict[str, Any], folder: Path) -> tuple[Any, Tensor]:
    """A folder whose router is quantized as its other layers are; the model, and the router's weight."""
    model = float_model()
    needs_data = config["quant_method"] in ("gptq", "awq")
    data = {"calibration": [IDS.repeat(2, 1)]} if needs_data else {}
    quantcore.save(quantcore.quantize(copy.deepcopy(model), config, **data), folder)
    weight = model.get_parameter(f"{ROUTER}.weight").detach()
    linear = nn.Linear(64, 32, bias=False)
    linear.weight = nn.Parameter(weight)
    layer = QuantizedLinear.from_linear(linear, config, name="model.layers.0.mlp.experts.0.up_proj")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{ROUTER}.weight"]
    tensors |= {f"{ROUTER}.{suffix}": tensor for suffix, tensor in layer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model, layer.dequantize(torch.float32)


def test_stored_router_loads_as_float(config: dict[str, Any], tmp_path: Path) -> None:
    model, weight = stored_router(config, tmp_path / "old")
    with use():
        served = type(model).from_pretrained(tmp_path / "old", dtype=torch.float32)
    ours = quantcore.load(tmp_path / "old", dtype=torch.float32)
    for found in (served, ours):
        assert type(found.get_submodule(ROUTER)) is type(model.get_submodule(ROUTER))
        torch.testing.assert_close(found.get_parameter(f"{ROUTER}.weight").detach(), weight, rtol=0, atol=0)
        bias = f"{ROUTER}.e_score_correction_bias"
        assert torch.equal(found.get_buffer(bias), model.get_buffer(bias))
    with torch.no_grad():
        assert torch.equal(served(input_ids=IDS).logits, ours(input_ids=IDS).logits)
        quantcore.save(ours, tmp_path / "new")
        again = quantcore.load(tmp_path / "new", dtype=torch.float32)
        assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_converted_router_loads_as_float(tmp_path: Path) -> None:
    _, weight = stored_router(CONFIGS["int8"], tmp_path / "old")
    quantcore.convert(tmp_path / "old", tmp_path / "float", dtype="float32")
    assert torch.equal(quantcore.load(tmp_path / "float").get_parameter(f"{ROUTER}.weight"), weight)


def test_damaged_router_is_named(tmp_path: Path) -> None:
    tmp_path = tmp_path / "old"
    stored_router(CONFIGS["int8"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scales = tensors[f"{ROUTER}.SCB"]
    for damaged, said in ((scales * float("nan"), "NaN"), (scales[:-1].clone(), "32")):
        save_file({**tensors, f"{ROUTER}.SCB": damaged}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"(?s){ROUTER}.*SCB.*{said}"):
            quantcore.load(tmp_path)


def test_router_on_disk_is_read_when_it_is_needed(tmp_path: Path) -> None:
    tmp_path = tmp_path / "old"
    stored_router(CONFIGS["int8"], tmp_path)
    with torch.no_grad():
        expected = quantcore.load(tmp_path, dtype=torch.float32)(input_ids=IDS).logits
        devices = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        model = quantcore.load(tmp_path, dtype=torch.float32, device_map={**devices, "model.layers": "disk"})
        assert model.get_parameter(f"{ROUTER}.weight").is_meta
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
