"""The experts of Llama 4, which FBGEMM's files store as 3-D tensors with a scale for each output column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder
from quantcore_fp8.fbgemm_fp8.format_columns import Fp8Columns
from quantcore_fp8.format import Fp8

GOLDEN = golden_folder("fbgemm_fp8", Path(__file__).parents[3] / "tests" / "golden")
CONFIG = {"quant_method": "fbgemm_fp8"}


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_quantizing_gives_the_golden_bytes(name: str) -> None:
    tensors = load_file(GOLDEN / "llama4-experts.safetensors")
    stored = {"weight": tensors[f"layer.{name}"], "weight_scale": tensors[f"layer.{name}_scale"]}
    weight = tensors[f"input.{name}"]
    weight_format = Fp8Columns().read(stored, tuple(weight.shape))
    assert weight_format.faults(stored, tuple(weight.shape)) == []
    assert differences(weight_format.quantize(weight), stored) == []
    found = weight_format.dequantize(stored, tuple(weight.shape), torch.bfloat16)
    scale = stored["weight_scale"] if name == "gate_up_proj" else stored["weight_scale"].transpose(1, 2)
    assert torch.equal(found, (stored["weight"].float() * scale).bfloat16())


def llama4() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    config = transformers.Llama4TextConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=48,
        intermediate_size_mlp=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model


def fused(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A 3-D weight in blocks of 64 x 32 of its own orientation, under the names of files that store experts whole."""
    stored = [Fp8(block=(64, 32)).quantize(matrix) for matrix in weight]
    names = {"weight": name, "weight_scale_inv": f"{name}_scale_inv"}
    return {names[suffix]: torch.stack([each[suffix] for each in stored]) for suffix in names}


def test_experts_that_are_stored_whole_in_blocks_are_read(tmp_path: Path) -> None:
    quantcore.save(llama4(), tmp_path / "in")
    tensors, values = load_file(tmp_path / "in" / "model.safetensors"), {}
    for name in [name for name in tensors if ".experts." in name]:
        values[name] = tensors[name]
        tensors |= fused(name, tensors[name])
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    loaded = quantcore.load(tmp_path / "in")
    quantcore.save(loaded, tmp_path / "again")
    assert differences(load_file(tmp_path / "again" / "model.safetensors"), tensors) == []
    experts, x = loaded.get_submodule("model.layers.0.feed_forward.experts"), torch.randn(2, 5, 64).bfloat16()
    for name, weight in values.items():
        stand_in, width = getattr(experts, name.rpartition(".")[2]), weight.shape[1]
        block = Fp8(block=(64, 32)).quantize(weight[1])
        matrix = Fp8(block=(64, 32)).dequantize(block, tuple(weight.shape[1:]), torch.bfloat16)
        assert torch.equal(stand_in[torch.tensor([1])][0], matrix)
        y = torch.bmm(x[:, :, :width].contiguous(), stand_in)
        expected = x[1, :, :width].float() @ matrix.float()
        assert float((y[1].float() - expected).norm() / expected.norm()) < 0.04  # the input is rounded to E4M3
        assert not torch.equal(y[1], expected.bfloat16())


def test_model_is_stored_as_upstream_does_and_loaded_again(tmp_path: Path) -> None:
    expected = llama4()
    found = quantcore.quantize(llama4(), CONFIG)
    quantcore.save(found, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    prefix = "model.layers.0.feed_forward.experts."
    shapes = {name.removeprefix(prefix): list(t.shape) for name, t in tensors.items() if name.startswith(prefix)}
    assert shapes == {
        "gate_up_proj": [2, 64, 96],
        "gate_up_proj_scale": [2, 1, 96],
        "down_proj": [2, 48, 64],
        "down_proj_scale": [2, 64, 1],
    }
    assert tensors[f"{prefix}down_proj"].dtype == torch.float8_e4m3fn
    loaded = quantcore.load(tmp_path / "saved")
    with torch.no_grad():
        ids = torch.arange(7)[None]
        logits = found(ids).logits
        assert torch.equal(loaded(ids).logits, logits)
        assert float((logits - expected(ids).logits).norm() / expected(ids).logits.norm()) < 0.2


def test_inputs_of_experts_are_rounded_as_those_of_layers() -> None:
    model = quantcore.quantize(llama4(), CONFIG)
    experts = model.get_submodule("model.layers.0.feed_forward.experts")
    x = torch.randn(2, 5, 64).bfloat16() * 1000  # beyond the bound, so that it saturates
    y = torch.bmm(x, experts.gate_up_proj)
    unbounded = torch.bmm(x, experts.gate_up_proj[torch.arange(2)])
    assert float(y.norm()) < 0.9 * float(unbounded.norm())
