"""Whole models: static scales from calibration data, experts, scales of keys and values, and loading as float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore
from quantcore.cli import main
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import relative_error
from quantcore_fp8.format import ROW, TENSOR, Fp8

STATIC = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        keys: Tensor = self.k_proj(x)
        return keys if cache is None else cache.update(keys[:, None], keys[:, None], 0)[0][:, 0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.up_proj = nn.Linear(64, 96)
        self.down_proj = nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(self.up_proj(self.self_attn(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def ids() -> Tensor:
    return torch.arange(40).view(2, 20) % 20


def saved(tmp_path: Path, config: dict[str, Any]) -> Path:
    quantcore.save(quantcore.quantize(model(), config), tmp_path / "saved")
    return tmp_path / "saved"


def test_static_scales_are_the_range_of_calibration_inputs() -> None:
    expected = model()
    seen: list[Tensor] = []
    expected.layers[0].up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        expected(ids())
    found = quantcore.quantize(model(), STATIC, calibration=ids())
    scale = found.layers[0].up_proj.stored["activation_scale"]
    assert scale.shape == ()
    assert float(scale) == pytest.approx(float(seen[0].abs().max()) / 448, rel=0.05)  # k_proj before it is rounded too
    assert relative_error(found(ids()), expected(ids())) < 0.05


def test_static_model_survives_saving(tmp_path: Path) -> None:
    found = quantcore.quantize(model(), STATIC, calibration=ids())
    quantcore.save(found, tmp_path / "saved")
    assert torch.equal(quantcore.load(tmp_path / "saved", Model)(ids()), found(ids()))


@pytest.mark.parametrize("owner", ["layers.0.self_attn", "layers.0.self_attn.k_proj"])
def test_scales_of_keys_are_kept(owner: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, {"quant_method": "fp8", "weight_block_size": None})
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"{owner}.k_scale": torch.tensor(0.25)}, folder / "model.safetensors")
    loaded = quantcore.load(folder, Model)
    assert float(loaded.state_dict()[f"{owner}.k_scale"]) == 0.25
    assert float(loaded.get_submodule(owner).k_scale) == 0.25
    quantcore.save(loaded, tmp_path / "again")
    assert float(load_file(tmp_path / "again" / "model.safetensors")[f"{owner}.k_scale"]) == 0.25
    assert not any("k_scale" in name for name in quantcore.dequantize(loaded).state_dict())


@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "suffixes", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.output_scale"), ("kv_scale",)], ids=str
)
def test_stored_scales_of_keys_and_values_round_the_cache(
    method: str, suffixes: tuple[str, ...], dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    from quantcore.integrations.transformers import use

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, head_dim=32, **sizes)
    quantcore.save(quantcore.quantize(transformers.LlamaForCausalLM(config), {"quant_method": method}), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    scales = {f"model.layers.0.self_attn.{name}": torch.tensor(0.00123, dtype=dtype) for name in suffixes}
    save_file({**tensors, **scales}, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with use():
        served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for loaded in (quantcore.load(tmp_path / "a"), served):
        stored = loaded.state_dict()
        assert all(torch.equal(stored[name], scale) for name, scale in scales.items())
        cache = loaded(ids(), use_cache=True).past_key_values.layers[0]
        for states in (cache.keys.float(), cache.values.float()):
            again = (states / 0.00123).to(torch.float8_e4m3fn).float() * 0.00123
            assert torch.allclose(again, states, rtol=0.01)
            assert len(states.unique()) < 250
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_scales_for_a_cache_that_nothing_takes_are_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"quant_method": "fp8", "weight_block_size": None})
    tensors = load_file(folder / "model.safetensors")
    name = "layers.0.down_proj.output_scale"
    save_file({**tensors, name: torch.tensor(0.25)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: forward of Block takes no cache"):
        quantcore.load(folder, Model)


def test_codes_without_their_scale_are_no_float_weight(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"quant_method": "fp8"})
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.up_proj: weight_scale_inv: missing"):
        quantcore.load(folder, Model)


def test_embedding_that_the_config_names_is_stored_under_one_scale(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "weight_block_size": None, "modules_to_convert": ["embed"]}
    folder = saved(tmp_path, config)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["embed.weight"].dtype == torch.float8_e4m3fn
    assert tensors["embed.weight_scale"].shape == (1,)
    loaded = quantcore.load(folder, Model)
    assert torch.equal(loaded.embed(ids()), (tensors["embed.weight"].float() * tensors["embed.weight_scale"])[ids()])


@pytest.mark.parametrize(("method", "dtype"), [("mxfp8", torch.uint8), ("fp8", torch.float32)])
def test_command_line_quantizes_by_the_method_it_names(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, head_dim=32, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(tmp_path / "float"), str(tmp_path / "made"), "--method", method])
    assert ended.value.code == 0
    written = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == method
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype == dtype


@pytest.mark.parametrize("block", [(128, 128), (3, 5), (1, 32), TENSOR, ROW], ids=str)
def test_rows_are_those_of_the_whole_weight(block: tuple[int, int]) -> None:
    weight_format, rows = Fp8(block=block), torch.tensor([129, 0, 7, 7])
    stored = weight_format.quantize(torch.randn(130, 70))
    whole = weight_format.dequantize(stored, (130, 70), torch.float32)
    assert torch.equal(weight_format.dequantize_rows(stored, (130, 70), rows, torch.float32), whole[rows])
    with pytest.raises(IndexError):
        weight_format.dequantize_rows(stored, (130, 70), torch.tensor([130]))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_dequantized_on_load_is_the_dequantized_model(dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = saved(tmp_path, {"quant_method": "mxfp8"})
    expected = quantcore.dequantize(quantcore.load(folder, Model, dtype=dtype), dtype)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(config))
    found = quantcore.load(folder, Model, dtype=dtype)
    assert type(found.layers[0].up_proj) is nn.Linear
    assert found.layers[0].up_proj.weight.dtype == (dtype or torch.float32)
    assert torch.equal(found(ids()), expected(ids()))


def mixture() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[],
    )
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4"])
def test_experts_are_stored_one_by_one_and_loaded_again(expert_dtype: str, tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "expert_dtype": expert_dtype, "scale_fmt": "ue8m0", "fmt": "e4m3"}
    found = quantcore.quantize(mixture(), config)
    quantcore.save(found, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    codes = tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    assert codes.dtype == (torch.float8_e4m3fn if expert_dtype == "fp8" else torch.int8)
    assert tensors["model.layers.0.mlp.experts.3.up_proj.weight_scale_inv"].dtype == torch.float8_e8m0fnu
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    loaded = quantcore.load(tmp_path / "saved")
    formats = [module.format for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    elements = {found.element.bits for found in formats if isinstance(found, Fp8)}
    assert elements == ({8} if expert_dtype == "fp8" else {8, 4})
    with torch.no_grad():
        tokens = torch.arange(6)[None]
        assert torch.equal(loaded(tokens).logits, found(tokens).logits)
