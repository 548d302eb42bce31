"""LoRA on the 3-D weights of quantized experts: the adapters of PEFT for the float model, by name, shape and effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_training import train
from torch import Tensor, nn

import quantcore
from quantcore.nn.replace import quantized_modules

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")

from quantcore.integrations import peft as adapters  # noqa: E402

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
FBGEMM = {"quant_method": "fbgemm_fp8"}  # stores the 3-D weights of Llama 4 whole
MXFP4 = {"quant_method": "mxfp4"}  # and this those of gpt-oss
# Family, its settings, how its experts are quantized. Llama 4 has weights [E, K, N], gpt-oss besides takes turns.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 3}, HQQ),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, HQQ),
    "gpt-oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 32}, HQQ),
    "gpt-oss-stack": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 32}, MXFP4),
    "llama4-stack": ("Llama4", {"num_local_experts": 3, "intermediate_size_mlp": 64, "head_dim": 32}, FBGEMM),
}
IDS = torch.arange(12).view(2, 6) * 7 % 96


def make(family: str) -> Any:
    """A small random model, quantized, with the same values at every call."""
    import transformers

    name, settings, config = FAMILIES[family]
    found = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(found(**{**SIZES, **settings})).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return quantcore.quantize(model, config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


def bits(model: nn.Module) -> list[Tensor]:
    stored = (tensor for _, module in quantized_modules(model) for tensor in module.stored.values())
    return [tensor.detach().reshape(-1).view(torch.uint8).clone() for tensor in stored]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(family: str) -> Any:
    """A quantized mixture with adapters on all that can have them, trained for a few steps."""
    torch.manual_seed(0)
    model = adapters.get_peft_model(make(family), lora())
    train(model, IDS, 4)
    return model


def expert_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, adapters.LoraQuantizedExperts)]


def test_all_linear_stands_for_the_experts_too(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make(family)
    expected = logits(model)
    adapted = adapters.get_peft_model(model, lora())
    assert [layer.parameter_name for layer in expert_layers(adapted)] == ["down_proj", "gate_up_proj"]
    assert "no adapter" not in caplog.text
    assert torch.equal(logits(adapted), expected)


def test_training_moves_every_adapter_and_no_stored_bit(family: str) -> None:
    torch.manual_seed(0)
    base = make(family)
    before = bits(base)
    model = adapters.get_peft_model(base, lora())
    losses = train(model, IDS, 4)
    assert losses[-1] < losses[0]
    assert all(bool(layer.lora_B["default"].weight.abs().sum() > 0) for layer in expert_layers(model))
    assert all(torch.equal(found, expected) for found, expected in zip(bits(model), before, strict=True))


def test_saved_adapters_load_onto_a_fresh_quantized_model(trained: Any, family: str, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(adapters.load_adapter(make(family), tmp_path)), logits(trained))


def test_adapters_pass_between_the_quantized_model_and_peft_alone(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = adapters.get_peft_model(make(family), lora())
    train(ours, IDS, 4)
    ours.save_pretrained(tmp_path / "ours")
    stock = peft.PeftModel.from_pretrained(quantcore.dequantize(make(family), torch.float32), tmp_path / "ours")
    # The same sums in another order. FP8 rounds inputs besides, which the float model does not.
    torch.testing.assert_close(logits(adapters.merge_to_float(ours, torch.float32)), logits(stock))
    stock.save_pretrained(tmp_path / "stock")
    expected = logits(adapters.load_adapter(make(family), tmp_path / "ours"))
    assert torch.equal(logits(adapters.load_adapter(make(family), tmp_path / "stock")), expected)


def test_merging_rounds_each_expert_and_unmerging_restores_every_bit(trained: Any) -> None:
    before, expected = bits(trained), logits(trained)
    trained.merge_adapter()
    errors = {name: error for name, error in adapters.merge_errors(trained).items() if ".experts." in name}
    assert [name.rpartition(".")[2] for name in errors] == ["down_proj", "gate_up_proj"]
    assert all(0 < error < 0.12 for error in errors.values())  # 4 bits of a normal weight: about 0.09
    assert not torch.equal(logits(trained), expected)
    trained.unmerge_adapter()
    assert all(torch.equal(found, wanted) for found, wanted in zip(bits(trained), before, strict=True))
    torch.testing.assert_close(logits(trained), expected)  # float layers are unmerged by a subtraction, which rounds


def test_merged_and_unloaded_mixture_is_a_quantized_one_that_saves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapters.get_peft_model(make("qwen3-moe"), lora())
    train(model, IDS, 4)
    merged = model.merge_and_unload()
    quantcore.save(merged, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(merged))


def test_adapter_that_is_not_finite_is_not_merged() -> None:
    model = adapters.get_peft_model(make("mixtral"), lora())
    before = bits(model)
    nn.init.constant_(expert_layers(model)[0].lora_B["default"].weight[:, -1:], float("inf"))  # the last expert
    with pytest.raises(ValueError, match=r"experts.2.w2: the weight with default merged holds NaN or inf"):
        expert_layers(model)[0].merge()
    assert all(torch.equal(found, wanted) for found, wanted in zip(bits(model), before, strict=True))


def test_projections_named_as_in_float_checkpoints_stand_for_the_fused_weights() -> None:
    model = adapters.get_peft_model(make("mixtral"), lora(target_modules=["q_proj", "w1", "w2", "w3"]))
    assert [layer.parameter_name for layer in expert_layers(model)] == ["down_proj", "gate_up_proj"]
    assert {layer.r["default"] for layer in expert_layers(model)} == {3, 6}  # two projections in one weight


def test_several_adapters_take_turns() -> None:
    torch.manual_seed(0)
    base = make("mixtral")
    plain = logits(base)
    model = adapters.get_peft_model(base, lora())
    train(model, IDS, 4)
    first = logits(model)
    adapters.add_adapter(model, "second", lora())
    model.set_adapter("second")
    train(model, IDS, 4)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_experts_without_adapters_are_told_of(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = adapters.get_peft_model(make("mixtral"), lora(**options))
    assert "experts get no adapters: PEFT has none for 3-D weights with use_dora, lora_dropout" in caplog.text
    assert "9 of 13 quantized layers got no adapter: model.layers.0.mlp.experts.0.w1" in caplog.text
    losses = train(model, IDS, 4)
    assert losses[-1] < losses[0]


def test_module_of_experts_is_no_target() -> None:
    with pytest.raises(TypeError, match="name the weights in target_parameters"):
        adapters.get_peft_model(make("mixtral"), lora(target_modules=["experts"]))


def test_prepared_mixture_trains_with_gradient_checkpointing() -> None:
    torch.manual_seed(0)
    base = make("qwen3-moe")
    before = bits(base)
    model = adapters.get_peft_model(adapters.prepare_model_for_kbit_training(base), lora())
    assert model.is_gradient_checkpointing
    losses = train(model, IDS, 4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(found, wanted) for found, wanted in zip(bits(model), before, strict=True))
