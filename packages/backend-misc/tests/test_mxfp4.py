"""MXFP4: golden layers, and a small gpt-oss that is read, made, run, trained and saved in its published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.nn.experts import QuantizedExperts
from quantcore.nn.stack import QuantizedStack
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder
from quantcore_misc.mxfp4.config import Mxfp4Config
from quantcore_misc.mxfp4.format import EXPERTS, LINEAR

GOLDEN = golden_folder("mxfp4", Path(__file__).parents[3] / "tests" / "golden")
MODEL = GOLDEN / "checkpoint-gptoss"
CONFIG: dict[str, Any] = {"quant_method": "mxfp4"}
PRODUCERS = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in ("linear-producers", "ties-and-edges-producers")
    for name in sorted({key.split(".")[0] for key in load_file(GOLDEN / f"{case}.safetensors")} - {"input"})
    # It decodes in float16, beyond whose range the second case goes.
    if case == "linear-producers" or not name.startswith("fouroversix")
]
PUBLISHED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


def gpt_oss(**sizes: Any) -> Any:
    """A small random gpt-oss in bfloat16, the same at every call. Its matrices have no two sides of one length."""
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    given = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GptOssConfig(**{**given, **heads, **sizes})
        model = transformers.GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(12).view(2, 6) * 7 % 96).logits
    assert isinstance(found, Tensor)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gpt-oss that was quantized and saved."""
    qc.save(qc.quantize(gpt_oss(), CONFIG), tmp_path / "quantized")
    return tmp_path / "quantized"


# Layers


@pytest.mark.parametrize(("case", "producer"), PRODUCERS)
def test_layer_of_any_producer_reads_as_it_reads_it(case: str, producer: str) -> None:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    out_features, in_features = tensors["input.weight"].shape
    stored = {"weight_packed": tensors[f"{producer}.packed"], "weight_scale": tensors[f"{producer}.scale"]}
    layer = QuantizedLinear.from_tensors(CONFIG, stored, in_features=in_features, out_features=out_features)
    assert torch.equal(layer.dequantize(torch.float32), tensors[f"{producer}.dequant"])
    assert layer.bits_per_weight == 4.25


@pytest.mark.parametrize("case", ["linear-producers", "ties-and-edges-producers"])
def test_layer_is_made_of_the_bytes_of_compressed_tensors(case: str) -> None:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    found = QuantizedLinear.from_linear(linear_of(tensors["input.weight"]), CONFIG).state_dict()
    assert torch.equal(found["weight_packed"], tensors["compressed_tensors.packed"])
    assert torch.equal(found["weight_scale"], tensors["compressed_tensors.scale"])


@pytest.mark.parametrize("case", ["linear-producers", "ties-and-edges-producers"])
def test_expert_is_made_of_the_bytes_of_transformers(case: str) -> None:
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    found = EXPERTS.quantize(tensors["input.weight"].t()[None])
    assert torch.equal(found["weight_blocks"][0].flatten(1), tensors["triton_kernels_round_up.packed"])
    assert torch.equal(found["weight_scales"][0], tensors["triton_kernels_round_up.scale"])


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_are_read_and_made_as_transformers_does(name: str) -> None:
    tensors = load_file(GOLDEN / "gptoss-experts.safetensors")
    stored = {f"weight_{part}": tensors[f"layer.{name}_{part}"] for part in ("blocks", "scales")}
    weight = tensors[f"input.{name.removesuffix('_proj')}_weight"].transpose(1, 2)
    stack = QuantizedStack(LINEAR, stored, tuple(weight.shape))
    assert torch.equal(stack.dequantize(torch.bfloat16), tensors[f"expected.{name}"])
    assert differences(QuantizedStack.from_weight(weight, EXPERTS).stored, stored) == []


def test_experts_compute_as_those_of_transformers() -> None:
    tensors = load_file(GOLDEN / "gptoss-experts.safetensors")
    fused = gpt_oss(num_local_experts=3).model.layers[0].mlp.experts.float()
    stacks = {}
    for name in ("gate_up_proj", "down_proj"):
        stored = {f"weight_{part}": tensors[f"layer.{name}_{part}"] for part in ("blocks", "scales")}
        stacks[name] = QuantizedStack(EXPERTS, stored, tuple(fused.get_parameter(name).shape), name)
        fused.get_parameter(f"{name}_bias").data = tensors[f"layer.{name}_bias"].float()
    experts = QuantizedExperts(fused, stacks=stacks)
    y = experts(*(tensors[f"expected.{part}"] for part in ("x", "router_indices", "router_scores")))
    torch.testing.assert_close(y, tensors["expected.y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_scale_is_the_power_of_two_of_transformers_and_the_last_is_nan(dtype: torch.dtype) -> None:
    tensors = load_file(GOLDEN / "dequant-all-scales.safetensors")
    stored = {"weight_blocks": tensors["layer.blocks"], "weight_scales": tensors["layer.scales"]}
    found = QuantizedStack(EXPERTS, stored, (1, 32, 256)).dequantize(dtype)
    expected = tensors[f"expected.{str(dtype).removeprefix('torch.')}"]
    assert torch.equal(found[..., :255], expected[..., :255])
    assert bool(found[..., 255].isnan().all())


def test_scale_that_is_nan_is_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][2, 5, 1] = 255
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\S*: 1 of 192 values are NaN, expert 2"):
        qc.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(2, 32, 4)
    weight[1, 0, 0] = value
    with pytest.raises(ValueError, match="gate_up_proj"):
        QuantizedStack.from_weight(weight, EXPERTS, name="gate_up_proj")


# The config


def test_config_is_written_as_transformers_writes_it() -> None:
    config = Mxfp4Config(PUBLISHED, dequantize=True)
    assert config.to_dict() == {"quant_method": "mxfp4", "modules_to_not_convert": PUBLISHED}
    assert config.get_loading_attributes() == {"dequantize": True}
    assert Mxfp4Config().to_dict() == {"quant_method": "mxfp4", "modules_to_not_convert": None}


def test_config_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="modules_to_not_convert"):
        Mxfp4Config("lm_head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dequantize"):
        Mxfp4Config(dequantize="yes")  # type: ignore[arg-type]


# Models


def test_published_layout_is_read_run_and_saved_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    expected = load_file(MODEL / "expected.safetensors")
    with torch.no_grad():
        exact = qc.load(MODEL, dtype="float32")(expected["input_ids"]).logits
        model = qc.load(MODEL)
        rounded = model(expected["input_ids"]).logits
    assert (exact - expected["logits_float32"]).abs().max() < 1e-4
    wanted = expected["logits_bfloat16"].float().flatten()
    assert torch.nn.functional.cosine_similarity(rounded.float().flatten(), wanted, 0) > 0.99
    qc.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert {"quant_method": "mxfp4", "modules_to_not_convert": PUBLISHED}.items() <= config.items()


@pytest.mark.parametrize("skips", [None, PUBLISHED, ["lm_head"]], ids=["default", "published", "head"])
def test_experts_alone_are_quantized_along_their_inputs(skips: list[str] | None, tmp_path: Path) -> None:
    qc.save(qc.quantize(gpt_oss(), {**CONFIG, "modules_to_not_convert": skips}), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = {name.rpartition(".")[2]: list(t.shape) for name, t in tensors.items() if t.dtype == torch.uint8}
    assert packed == {
        "gate_up_proj_blocks": [4, 192, 2, 16],
        "gate_up_proj_scales": [4, 192, 2],
        "down_proj_blocks": [4, 64, 3, 16],
        "down_proj_scales": [4, 64, 3],
    }
    biases = {list(t.shape)[1] for name, t in tensors.items() if name.endswith("_proj_bias")}
    assert biases == {192, 64}
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("skip", ["model.layers.0.mlp.experts", "model.layers.*.mlp.experts", "*.mlp.experts*"])
def test_experts_that_a_pattern_names_stay_float(skip: str) -> None:
    model = qc.quantize(gpt_oss(num_hidden_layers=2), {**CONFIG, "modules_to_not_convert": ["lm_head"]})
    assert len([module for module in model.modules() if isinstance(module, QuantizedStack)]) == 4
    with pytest.raises(ValueError, match="every Linear layer"):
        qc.quantize(gpt_oss(), {**CONFIG, "modules_to_not_convert": [skip]})


def test_quantized_model_computes_as_its_weights_do(folder: Path) -> None:
    model = qc.load(folder)
    expected = logits(model)
    assert torch.equal(logits(qc.quantize(gpt_oss(), CONFIG)), expected)
    assert torch.equal(logits(qc.dequantize(model)), expected)
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_file_to_file_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    qc.save(gpt_oss(), tmp_path / "float")
    qc.quantize_checkpoint(tmp_path / "float", tmp_path / "out", CONFIG)
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")) == []


def test_files_are_converted_without_a_model_and_without_loss(folder: Path, tmp_path: Path) -> None:
    expected = logits(qc.load(folder))
    qc.convert(folder, tmp_path / "float")
    assert torch.equal(logits(qc.load(tmp_path / "float")), expected)
    done = qc.convert(folder, tmp_path / "apart", {"quant_method": "compressed-tensors", "scheme": "MXFP4A16"})
    assert len(done.exact) == 3 * 4
    assert done.lossy == {}
    torch.testing.assert_close(logits(qc.load(tmp_path / "apart")), expected)
    qc.convert(folder, tmp_path / "same", CONFIG)
    assert (
        differences(load_file(tmp_path / "same" / "model.safetensors"), load_file(folder / "model.safetensors")) == []
    )


def test_weights_are_floats_where_the_load_asks_for_them(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quantcore.integrations.transformers import use

    with use():
        packed = AutoModelForCausalLM.from_pretrained(folder)
        dense = AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert any(isinstance(module, QuantizedStack) for module in packed.modules())
    assert type(dense) is type(packed)
    assert {name: t.shape for name, t in dense.state_dict().items()} == {
        name: t.shape for name, t in gpt_oss().state_dict().items()
    }
    assert torch.equal(logits(packed), logits(dense))
    assert torch.equal(logits(packed), logits(qc.load(folder)))


def test_adapters_train_on_packed_experts_that_transformers_loaded(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")
    from transformers import AutoModelForCausalLM

    from quantcore.integrations import peft as adapters
    from quantcore.integrations.transformers import use

    with use():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapters.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM")
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(8)[None]
    losses = []
    for _ in range(20):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path / "adapters")
    with use():
        fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(adapters.load_adapter(fresh, tmp_path / "adapters")), logits(model.eval()))
    stored = [module.stored for module in base.modules() if isinstance(module, QuantizedStack)]
    before = [module.stored for module in qc.load(folder).modules() if isinstance(module, QuantizedStack)]
    assert [differences(*pair) for pair in zip(stored, before, strict=True)] == [[], []]


def test_float_model_is_quantized_by_transformers_loader_and_saved(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quantcore.integrations.transformers import use

    gpt_oss().save_pretrained(tmp_path / "float")
    with use():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=Mxfp4Config())
        model.save_pretrained(tmp_path / "out")
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")) == []


def test_transformers_alone_reads_what_was_saved(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config as StockConfig

    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=StockConfig(dequantize=True))
    ours = qc.dequantize(qc.load(folder))
    found, expected = stock.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_missing_scales_and_odd_widths_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="down_proj"):
        qc.load(folder)
    with pytest.raises(ValueError, match=r"down_proj: in_features 80 is not a multiple of 32"):
        qc.quantize(gpt_oss(intermediate_size=80), CONFIG)


def test_other_models_are_stored_layer_by_layer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = qc.quantize(transformers.LlamaForCausalLM(config).eval(), CONFIG)
    qc.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 48)
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (64, 3)
    assert "lm_head.weight" in tensors
    assert torch.equal(logits(qc.load(tmp_path / "out")), logits(model))
