"""Models of real architectures, small and random: what each method quantizes in them, and the whole way round."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantcore
from quantcore.checkpoints.shards import SINGLE_NAME
from quantcore.nn.replace import quantized_modules

Make = Callable[[str], Any]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 64}

LLAMA_LAYER = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA = [f"model.layers.{number}.{name}" for number in range(2) for name in LLAMA_LAYER]
GPT2 = [
    f"transformer.h.{number}.{name}"
    for number in range(2)
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def names(model: Any) -> list[str]:
    return [name for name, _ in quantized_modules(model)]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) * 7 % 96
    with torch.no_grad():
        found = model(ids).logits
    assert isinstance(found, torch.Tensor)
    return found


# The whole way


def test_saved_and_loaded_model_gives_the_same_logits(
    make_model: Make, architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    model = quantcore.quantize(make_model(architecture), config)
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert names(loaded) == names(model)
    assert torch.equal(logits(loaded), logits(model))


def test_loaded_model_saves_to_the_same_bytes(
    make_model: Make, architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    quantcore.save(quantcore.quantize(make_model(architecture), config), tmp_path / "one")
    quantcore.save(quantcore.load(tmp_path / "one"), tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_dequantized_model_is_a_float_model_of_its_architecture(
    make_model: Make, architecture: str, config: dict[str, Any]
) -> None:
    untouched, model = make_model(architecture), quantcore.quantize(make_model(architecture), config)
    dense = quantcore.dequantize(copy.deepcopy(model))
    assert {name: type(module) for name, module in dense.named_modules()} == {
        name: type(module) for name, module in untouched.named_modules()
    }
    assert {name: tensor.shape for name, tensor in dense.state_dict().items()} == {
        name: tensor.shape for name, tensor in untouched.state_dict().items()
    }
    assert all(parameter.is_floating_point() for parameter in dense.parameters())


def test_dequantized_model_computes_the_same(make_model: Make, architecture: str) -> None:
    model = quantcore.quantize(make_model(architecture), NF4)
    expected = logits(model)
    # Conv1D multiplies by the transposed weight: another order of accumulation in float32.
    torch.testing.assert_close(logits(quantcore.dequantize(model)), expected, rtol=1e-4, atol=1e-5)


def test_dequantized_model_is_saved_and_loaded_as_float(make_model: Make, architecture: str, tmp_path: Path) -> None:
    model = quantcore.dequantize(quantcore.quantize(make_model(architecture), HQQ))
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out")
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(model))


def test_weights_are_dequantized_to_the_dtype_that_a_model_was_loaded_in(make_model: Make, tmp_path: Path) -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    quantcore.save(quantcore.quantize(model, HQQ), tmp_path / "out")
    dense = quantcore.dequantize(quantcore.load(tmp_path / "out", dtype="float32"))
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    assert logits(dense).isfinite().all()


def test_float_checkpoint_of_transformers_loads(make_model: Make, architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(model))


def test_float32_norms_of_a_half_precision_checkpoint_are_cast(make_model: Make, tmp_path: Path) -> None:
    quantcore.save(make_model("llama").to(torch.bfloat16), tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / SINGLE_NAME)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "mixed" / SINGLE_NAME)
    loaded = quantcore.load(tmp_path / "mixed")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert logits(loaded).dtype == torch.bfloat16


def test_loaded_model_generates_the_same_tokens(make_model: Make, config: dict[str, Any], tmp_path: Path) -> None:
    model = quantcore.quantize(make_model("llama"), config)
    quantcore.save(model, tmp_path / "out")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([[5, 17, 30]])
    expected = model.generate(prompt, **options)  # type: ignore[operator]
    assert torch.equal(quantcore.load(tmp_path / "out").generate(prompt, **options), expected)  # type: ignore[operator]


def test_config_of_the_model_keeps_its_own_fields(make_model: Make, architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    before = model.config.to_dict()
    quantcore.save(quantcore.quantize(model, NF4), tmp_path / "out")
    after = quantcore.load(tmp_path / "out").config.to_dict()  # type: ignore[union-attr, operator]
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed <= {"architectures", "_name_or_path", "dtype", "quantization_config"}


@pytest.mark.parametrize("config", [None, NF4], ids=["float", "bitsandbytes"])
def test_dtype_is_written_of_a_config_that_names_none(
    make_model: Make, config: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = make_model("llama").to(torch.bfloat16)
    model.config.dtype = None
    quantcore.save(model if config is None else quantcore.quantize(model, config), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert quantcore.load(tmp_path / "out").config.dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_go_the_whole_way(make_model: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("llama")
    for parameter in model.parameters():  # `.to` would round the rotary frequencies, which are no part of a checkpoint
        parameter.data = parameter.data.to(dtype)
    quantcore.quantize(model, {**NF4, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")})
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out")
    assert logits(loaded).dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


# What is quantized


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama", LLAMA), ("llama-tied", LLAMA), ("gpt2", GPT2)],
    ids=["llama", "llama-tied", "gpt2"],
)
@pytest.mark.parametrize("config", [NF4, HQQ], ids=["bitsandbytes", "hqq"])
def test_every_layer_but_the_head_is_quantized(
    make_model: Make, name: str, expected: list[str], config: dict[str, Any]
) -> None:
    assert names(quantcore.quantize(make_model(name), config)) == expected


def test_classifier_whose_last_parameter_is_a_bias_is_quantized(make_model: Make) -> None:
    # The automatic list holds "classifier.bias", which protects nothing: so it is upstream.
    assert "classifier" in names(quantcore.quantize(make_model("bert"), NF4))


def test_tied_head_stays_tied_and_float_whatever_the_list(make_model: Make, tmp_path: Path) -> None:
    model = quantcore.quantize(make_model("llama-tied"), {**NF4, "llm_int8_skip_modules": []})
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # type: ignore[union-attr]
    assert torch.equal(logits(loaded), logits(model))


def test_given_list_of_bitsandbytes_replaces_the_automatic_one(make_model: Make) -> None:
    model = quantcore.quantize(make_model("llama"), {**NF4, "llm_int8_skip_modules": ["model.layers.0"]})
    assert names(model) == [*(name for name in LLAMA if ".1." in name), "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("down_proj", [name for name in LLAMA if name.endswith("down_proj")]),
        (r"model\.layers\.[1-9]\.mlp", [name for name in LLAMA if ".1.mlp" in name]),
        (r".*self_attn", [name for name in LLAMA if "self_attn" in name]),
        ("proj", LLAMA),
        ("mlp", []),
        ("model.layers.1", [name for name in LLAMA if ".1." in name]),
        ("odel.layers.1", []),
    ],
)
def test_pattern_of_bitsandbytes_is_a_regex_from_the_start_or_a_suffix(
    make_model: Make, pattern: str, left: list[str]
) -> None:
    model = quantcore.quantize(make_model("llama"), {**NF4, "llm_int8_skip_modules": [pattern]})
    assert names(model) == [name for name in [*LLAMA, "lm_head"] if name not in left]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("mlp", [name for name in LLAMA if "mlp" in name]),
        ("layers.1", [name for name in LLAMA if ".1." in name]),
        ("_pro", LLAMA),
        (r".*mlp", []),
    ],
)
def test_pattern_of_hqq_is_plain_text_anywhere(make_model: Make, pattern: str, left: list[str]) -> None:
    model = quantcore.quantize(make_model("llama"), {**HQQ, "skip_modules": [pattern]})
    assert names(model) == [name for name in [*LLAMA, "lm_head"] if name not in left]


def test_hqq_settings_by_tag_leave_the_other_layers_float(make_model: Make, tmp_path: Path) -> None:
    config = {
        "quant_method": "hqq",
        "dynamic_config": {"mlp.down_proj": {"nbits": 8, "group_size": 128}, "self_attn.q_proj": {"nbits": 2}},
    }
    model = quantcore.quantize(make_model("llama"), config)
    bits = {name: module.format.bits for name, module in quantized_modules(model)}  # type: ignore[attr-defined]
    assert bits == {
        name: 8 if "down" in name else 2 for name in LLAMA if name.endswith(("down_proj", "self_attn.q_proj"))
    }
    quantcore.save(model, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out")), logits(model))


def test_conv1d_is_stored_as_its_transpose(make_model: Make) -> None:
    model = quantcore.quantize(make_model("gpt2"), NF4)
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    assert (layer.out_features, layer.in_features) == (192, 64)
    dense = make_model("gpt2").get_submodule("transformer.h.0.attn.c_attn").weight
    # NF4 in blocks of 64: the error of a normal weight is near a tenth (QLoRA, arXiv:2305.14314, table 2).
    error = (layer.dequantize() - dense.t()).norm() / dense.norm()  # type: ignore[operator]
    assert error < 0.12


# What lies beside the weights


def test_tokenizer_and_generation_settings_come_along(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "examples" / "stdlib-lm"
    model = quantcore.quantize(quantcore.load(source), NF4)
    assert model.generation_config.eos_token_id == 1  # type: ignore[union-attr]
    model.generation_config.max_new_tokens = 7  # type: ignore[union-attr]
    quantcore.save(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert quantcore.load(tmp_path / "out").generation_config.max_new_tokens == 7  # type: ignore[union-attr]
