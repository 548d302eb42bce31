"""LoRA and DoRA on quantized layers through PEFT: training, saving, merging, and what must stay as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_training import train
from torch import Tensor, nn

import quantcore
from quantcore.nn.embedding import QuantizedEmbedding
from quantcore.nn.linear import QuantizedLinear
from quantcore.nn.replace import quantized_modules

peft = pytest.importorskip("peft", reason="the extra `peft` is not installed")

from quantcore.integrations import peft as adapters  # noqa: E402

IDS = torch.arange(12).view(2, 6) * 7 % 96
NF4_DOUBLE = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4-double": NF4_DOUBLE,
    "fp4-bf16-storage": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "hqq-3bit-axis0": {"quant_method": "hqq", "nbits": 3, "group_size": 32, "axis": 0},
}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0}
Make = Callable[[str], Any]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A config of a method whose tensors differ in kind from those of the others, each in turn."""
    return dict(request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=IDS).logits
    assert isinstance(found, Tensor)
    return found


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor as bytes: among packed floats are NaNs, which equal nothing."""
    return {
        f"{getattr(module, 'name', '')}:{suffix}": tensor.detach().reshape(-1).view(torch.uint8).clone()
        for _, module in quantized_modules(model)
        for suffix, tensor in module.stored.items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.fixture(params=["lora", "dora"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"use_dora": request.param == "dora"}


@pytest.fixture
def trained(make_model: Make, config: dict[str, Any], options: dict[str, Any]) -> Any:
    """A quantized Llama with adapters on every linear layer but the head, trained for a few steps."""
    torch.manual_seed(0)
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), config), lora(**options))
    train(model, IDS, 3)
    return model


# Adding and training


def test_adapters_go_on_every_layer_but_the_head(make_model: Make, config: dict[str, Any]) -> None:
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), config), lora())
    layers = [name for name, module in model.named_modules() if isinstance(module, adapters.LoraQuantizedLinear)]
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)


def test_new_adapter_changes_nothing(make_model: Make, config: dict[str, Any], options: dict[str, Any]) -> None:
    model = quantcore.quantize(make_model("llama"), config)
    expected = logits(model)
    # DoRA computes with magnitude / norm, which is 1 up to rounding in float32.
    torch.testing.assert_close(logits(adapters.get_peft_model(model, lora(**options))), expected, rtol=1e-5, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(
    make_model: Make, config: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    base = quantcore.quantize(make_model("llama"), config)
    before = bits(base)
    model = adapters.get_peft_model(base, lora(**options))
    losses = train(model, IDS, 8)
    assert losses[-1] < 0.9 * losses[0]
    assert_same_bits(bits(model), before)


def test_conv1d_layers_take_adapters_whatever_fan_in_fan_out_says(make_model: Make) -> None:
    for fan_in_fan_out in (False, True):
        model = quantcore.quantize(make_model("gpt2"), NF4_DOUBLE)
        model = adapters.get_peft_model(model, lora(fan_in_fan_out=fan_in_fan_out))
        losses = train(model, IDS, 4)
        assert losses[-1] < losses[0]
        expected = logits(model)
        torch.testing.assert_close(logits(adapters.merge_to_float(model, torch.float32)), expected)


def test_registered_config_works_with_pefts_own_function(make_model: Make) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(quantcore.quantize(make_model("llama"), NF4_DOUBLE), adapters.register(config))
    assert sum(isinstance(module, adapters.LoraQuantizedLinear) for module in model.modules()) == 4


def test_adapters_stay_in_float32_over_a_bfloat16_model(make_model: Make) -> None:
    model = quantcore.quantize(make_model("llama").to(torch.bfloat16), NF4_DOUBLE)
    model = adapters.get_peft_model(model, lora())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_another_kind_of_adapter_is_refused(make_model: Make) -> None:
    with pytest.raises(TypeError, match="LoRA or DoRA; got a IA3Config"):
        adapters.register(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def test_quantized_module_is_not_trained_whole(make_model: Make) -> None:
    model = quantcore.quantize(make_model("llama"), NF4_DOUBLE)
    with pytest.raises(ValueError, match="modules_to_save names quantized modules"):
        adapters.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"], modules_to_save=["q_proj"]))


def test_float_head_is_trained_whole_beside_adapters(make_model: Make) -> None:
    torch.manual_seed(0)
    model = quantcore.quantize(make_model("llama"), NF4_DOUBLE)
    before = model.lm_head.weight.detach().clone()
    adapted = adapters.get_peft_model(model, lora(modules_to_save=["lm_head"]))
    train(adapted, IDS, 3)
    merged = adapted.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    assert not torch.equal(merged.lm_head.weight, before)


# Embeddings


@pytest.fixture
def embedded(make_model: Make, options: dict[str, Any]) -> Any:
    """A Llama with a quantized embedding that has adapters, trained for a few steps."""
    torch.manual_seed(0)
    model = quantcore.quantize(make_model("llama"), NF4_DOUBLE)
    quantized = QuantizedEmbedding.from_embedding(model.model.embed_tokens, CONFIGS["hqq-3bit-axis0"])
    model.model.embed_tokens = quantized
    expected = logits(model)
    targets = ["q_proj", "embed_tokens"]
    adapted = adapters.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, **options))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-5, atol=1e-6)
    losses = train(adapted, IDS, 6)
    assert losses[-1] < losses[0]
    return adapted


def test_adapted_embedding_merges_and_restores_every_bit(embedded: Any) -> None:
    before, expected = bits(embedded), logits(embedded)
    embedded.merge_adapter()
    # A step of 1/7 of the range of 32 normal weights, uniform error: about 0.17; more where rows trained more.
    assert 0 < adapters.merge_errors(embedded)["base_model.model.model.embed_tokens"] < 0.3
    embedded.unmerge_adapter()
    assert_same_bits(bits(embedded), before)
    assert torch.equal(logits(embedded), expected)


def test_adapted_embedding_merges_into_float_without_loss(embedded: Any) -> None:
    expected = logits(embedded)
    merged = adapters.merge_to_float(embedded, torch.float32)
    assert type(merged.model.embed_tokens) is nn.Embedding
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


# Preparing


def test_preparing_leaves_every_stored_byte(make_model: Make, config: dict[str, Any]) -> None:
    model = quantcore.quantize(make_model("llama").to(torch.bfloat16), config)
    before = bits(model)
    prepared = adapters.prepare_model_for_kbit_training(model)
    assert_same_bits(bits(prepared), before)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert prepared.model.norm.weight.dtype == torch.float32


def test_prepared_model_trains_with_gradient_checkpointing(make_model: Make) -> None:
    torch.manual_seed(0)
    model = adapters.prepare_model_for_kbit_training(quantcore.quantize(make_model("llama"), NF4_DOUBLE))
    assert model.is_gradient_checkpointing
    losses = train(adapters.get_peft_model(model, lora()), IDS, 6)
    assert losses[-1] < losses[0]


# Saving and loading


def test_saved_adapter_loads_onto_a_fresh_quantized_model(
    trained: Any, make_model: Make, config: dict[str, Any], tmp_path: Path
) -> None:
    expected = logits(trained)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = adapters.load_adapter(quantcore.quantize(make_model("llama"), config), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)


def test_saved_adapter_loads_onto_the_float_model_in_peft_alone(make_model: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), NF4_DOUBLE), lora())
    train(model, IDS, 6)
    model.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    merged = stock.merge_and_unload().state_dict()
    name = "model.layers.0.mlp.up_proj"
    delta = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
    torch.testing.assert_close(merged[f"{name}.weight"] - make_model("llama").state_dict()[f"{name}.weight"], delta)


# Merging


def test_merging_rounds_as_much_as_it_reports(trained: Any) -> None:
    name, layer = next((n, m) for n, m in trained.named_modules() if isinstance(m, adapters.LoraQuantizedLinear))
    wanted, _ = layer.merged_weight()
    trained.merge_adapter()
    found = layer.get_base_layer().dequantize(torch.float32)
    errors = adapters.merge_errors(trained)
    assert len(errors) == 14
    assert errors[name] == pytest.approx(float((found - wanted).norm() / wanted.norm()))


def test_adapters_merged_one_after_the_other_or_at_once_are_the_same(make_model: Make) -> None:
    torch.manual_seed(0)
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), NF4_DOUBLE), lora(use_dora=True))
    model.add_adapter("second", adapters.register(lora(use_dora=True), model))
    for layer in (module for module in model.modules() if isinstance(module, adapters.LoraQuantizedLinear)):
        for adapter in ("default", "second"):
            nn.init.normal_(layer.lora_B[adapter].weight, std=0.1)
    layer = next(module for module in model.modules() if isinstance(module, adapters.LoraQuantizedLinear))
    at_once, _ = layer.merged_weight(["default", "second"])
    first, _ = layer.merged_weight(["default"])
    layer.merge(adapter_names=["default"])
    rounding = layer.get_base_layer().dequantize(torch.float32) - first
    one_by_one, _ = layer.merged_weight(["second"])
    difference = one_by_one - at_once
    # What differs is the rounding of the first merge, of which the second adapter scales each row as a whole.
    factor = (difference * rounding).sum(1, keepdim=True) / rounding.square().sum(1, keepdim=True)
    torch.testing.assert_close(difference, factor * rounding, rtol=1e-3, atol=1e-6)


def test_unmerging_restores_every_bit(trained: Any) -> None:
    before, expected = bits(trained), logits(trained)
    trained.merge_adapter()
    assert not torch.equal(logits(trained), expected)
    trained.unmerge_adapter()
    assert_same_bits(bits(trained), before)
    assert torch.equal(logits(trained), expected)
    assert adapters.merge_errors(trained) == {}


def test_merged_and_unloaded_model_is_a_quantized_one_that_saves(trained: Any, tmp_path: Path) -> None:
    merged = trained.merge_and_unload()
    assert all(type(module) is QuantizedLinear for _, module in quantized_modules(merged))
    quantcore.save(merged, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(merged))


def test_merging_into_float_loses_nothing(trained: Any) -> None:
    expected = logits(trained)
    merged = adapters.merge_to_float(trained, torch.float32)
    assert not list(quantized_modules(merged))
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), expected)


def test_eight_bit_layers_train_and_merge(make_model: Make) -> None:
    torch.manual_seed(0)
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), INT8), lora())
    losses = train(model, IDS, 8)
    assert losses[-1] < 0.9 * losses[0]
    before = bits(model)
    model.merge_adapter()
    # One step of 1/127 of a row's maximum, uniform error: about 0.006 of a normal weight.
    assert max(adapters.merge_errors(model).values()) < 0.01
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


def test_weight_that_is_not_finite_is_not_merged(make_model: Make) -> None:
    model = adapters.get_peft_model(quantcore.quantize(make_model("llama"), NF4_DOUBLE), lora())
    before = bits(model)
    layer = next(module for module in model.modules() if isinstance(module, adapters.LoraQuantizedLinear))
    nn.init.constant_(layer.lora_B["default"].weight, float("inf"))
    with pytest.raises(ValueError, match="with default merged holds NaN or inf"):
        model.merge_adapter()
    assert_same_bits(bits(model), before)
