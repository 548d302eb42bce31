"""`quantcore quantize --bits-budget` and `--target-size`, with every method whose layers may have bits of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import cli

import quantcore
from quantcore.nn.replace import quantized_modules
from quantcore.plugins.discovery import methods
from quantcore.plugins.manager import plugins
from quantcore.workflows.generation import written_rows

FLAGS = {
    "gptq": ["--bits", "4", "--group-size", "32"],
    "auto-round": ["--bits", "4", "--group-size", "32"],
    "compressed-tensors": ["--scheme", "W4A16"],
    "higgs": ["--hadamard-size", "128", "--group-size", "64"],
}


def able() -> list[str]:
    names = [info.method for info in methods() if info.installed]
    return [name for name in names if plugins().backend(name).per_layer is not None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two blocks, whose second MLP is far from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=2, **heads)
    )
    model.save_pretrained(folder)
    return folder


def float_layers(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the linear layers by name."""
    model = quantcore.load(folder)
    return {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


@pytest.mark.parametrize("method", able())
def test_bits_stay_within_the_budget_and_use_most_of_it(source: Path, method: str) -> None:
    line = ["quantize", source, "--method", method, *FLAGS.get(method, [])]
    result = cli(*line, "--bits-budget", "3.9", "--dry-run", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert 3.4 < found["bits_per_quantized_weight"] <= 3.9
    assert found["layers"] == 14
    assert len(found["formats"]) > 1
    assert "share of its kind" in result.err


@pytest.mark.parametrize("method", ["compressed-tensors", "higgs"])
def test_files_with_bits_of_their_own_for_layers_are_read_as_written(source: Path, tmp_path: Path, method: str) -> None:
    result = cli("quantize", source, tmp_path / "q", "--method", method, *FLAGS.get(method, []), "--bits-budget", "3.9")
    assert result.code == 0, result.err
    loaded, expected = dict(quantized_modules(quantcore.load(tmp_path / "q"))), float_layers(source)
    assert loaded.keys() == expected.keys() - {"lm_head"}
    assert len({layer.format for layer in loaded.values()}) > 1
    for name, layer in loaded.items():
        error = (layer.dequantize().float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.6  # of the fewest bits, 2, which leave about 0.4


def test_budget_groups_layers_by_the_setting_that_they_got(source: Path, tmp_path: Path) -> None:
    line = ["quantize", source, tmp_path / "q", "--method", "compressed-tensors", "--scheme", "W4A16"]
    assert cli(*line, "--bits-budget", "3.9").code == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert len({group["weights"]["num_bits"] for group in groups}) == len(groups) > 1
    named = [target for group in groups for target in group["targets"]]
    assert sorted(named) == sorted(float_layers(source).keys() - {"lm_head"})
    assert {group["weights"]["group_size"] for group in groups} == {128}


def test_several_groups_are_refused_with_their_names(source: Path, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 128}
    groups = {
        "wide": {"targets": ["re:.*up_proj"], "weights": weights},
        "rest": {"targets": ["Linear"], "weights": weights},
    }
    (tmp_path / "c.json").write_text(json.dumps({"quant_method": "compressed-tensors", "config_groups": groups}))
    result = cli("quantize", source, "--config", tmp_path / "c.json", "--bits-budget", "3", "--dry-run")
    assert result.code == 1
    assert "bits are chosen within one group of config_groups; the config has wide, rest" in result.err


def test_target_size_is_that_of_the_file(source: Path, tmp_path: Path) -> None:
    line = ["quantize", source, tmp_path / "q", "--method", "hqq", "--target-size", "680kB", "--json"]
    result = cli(*line)
    assert result.code == 0, result.err
    assert 600_000 < json.loads(result.out)["file_bytes"] <= 680_000


def test_budget_that_cannot_be_kept_names_the_smallest(source: Path) -> None:
    result = cli("quantize", source, "--method", "hqq", "--bits-budget", "1", "--dry-run")
    assert result.code == 1
    assert "the smallest choices take" in result.err


def test_method_without_settings_for_layers_is_refused_with_those_that_have(source: Path) -> None:
    result = cli("quantize", source, "--method", "eetq", "--bits-budget", "8", "--dry-run")
    assert result.code == 2
    assert "eetq has no settings for single layers" in result.err
    assert "hqq" in result.err


def test_two_budgets_are_refused(source: Path) -> None:
    result = cli("quantize", source, "--method", "hqq", "--bits-budget", "3", "--target-size", "1MB", "--dry-run")
    assert result.code == 2
    assert "give one" in result.err


def test_without_a_text_the_model_writes_one(source: Path) -> None:
    result = cli("quantize", source, "--method", "hqq", "--bits-budget", "3.9", "--dry-run")
    assert result.code == 0, result.err
    assert "measuring how sensitive the model is to each layer" in result.err
    assert "count by how far their weights move" not in result.err


def test_model_that_writes_no_text_is_told_how_its_layers_count(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    result = cli("quantize", tmp_path / "bert", "--method", "hqq", "--bits-budget", "3.9", "--dry-run")
    assert result.code == 0, result.err
    assert "BertForMaskedLM generates no text" in result.err
    assert "count by how far their weights move" in result.err


def test_what_a_model_writes_repeats_and_leaves_the_generator() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=20, **sizes))
    state = torch.get_rng_state()
    first, again, other = (written_rows(model, 3, 24, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 20)  # the context holds no more
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
