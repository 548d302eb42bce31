"""The experts of Llama 4, which FBGEMM's files store as 3-D tensors with a scale for each output column."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantcore
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder
from quantcore_fp8.fbgemm_fp8.format_columns import Fp8Columns

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
    transformers = pytest.importorskip("transformers")
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
