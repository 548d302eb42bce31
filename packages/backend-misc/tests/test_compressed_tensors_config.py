"""The config of compressed-tensors: schemes and presets, older spellings, JSON, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import quantcore
from quantcore.testing.golden import golden_folder
from quantcore_misc.compressed_tensors.config import CompressedTensorsConfig
from quantcore_misc.compressed_tensors.matching import scheme_of
from quantcore_misc.compressed_tensors.presets import PRESETS

GOLDEN = golden_folder("compressed-tensors", Path(__file__).parents[3] / "tests" / "golden")
INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "strategy": "channel"}


def parse(**fields: Any) -> CompressedTensorsConfig:
    config = quantcore.AutoQuantizationConfig.from_dict({"quant_method": "compressed-tensors", **fields})
    assert isinstance(config, CompressedTensorsConfig)
    return config


def group(weights: dict[str, Any], targets: list[str] | None = None, **scheme: Any) -> dict[str, Any]:
    return {"targets": targets or ["Linear"], "weights": weights, **scheme}


def golden_dicts() -> list[Any]:
    cases = [json.loads(file.read_text()) for file in sorted(GOLDEN.glob("*.json"))]
    configs = [json.loads(file.read_text()) for file in sorted(GOLDEN.glob("checkpoint-*/config.json"))]
    return [each["quantization_config"] for each in [*cases, *configs]]


@pytest.mark.parametrize("given", golden_dicts(), ids=lambda given: str(given.get("format", "sparse")))
def test_config_that_upstream_wrote_is_written_back_key_by_key(given: dict[str, Any]) -> None:
    config = quantcore.AutoQuantizationConfig.from_dict(given)
    assert config.to_dict() == given
    assert quantcore.AutoQuantizationConfig.from_dict(config.to_dict()) == config


def test_changed_field_of_a_config_with_a_version_is_written_as_changed() -> None:
    config = parse(config_groups={"g": group(INT4, input_activations=None)}, version="0.19.0", format="pack-quantized")
    config.update(ignore=["lm_head"])
    assert config.to_dict()["ignore"] == ["lm_head"]
    assert config.to_dict()["config_groups"]["g"]["weights"] == INT4


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_scheme_of_every_linear_layer(name: str) -> None:
    config = CompressedTensorsConfig(scheme=name.lower())
    (scheme,) = config.schemes()
    assert scheme.targets == ("Linear",)
    assert config == CompressedTensorsConfig(config_groups={"group_0": config.config_groups["group_0"]})
    named = CompressedTensorsConfig(config_groups={name: ["Linear"]})
    assert named.schemes()[0].weights == scheme.weights


def test_preset_means_what_it_meant_in_the_version_of_the_file() -> None:
    assert parse(config_groups={"W8A16": ["Linear"]}, version="0.9.4").schemes()[0].weights.strategy == "channel"
    assert parse(config_groups={"W8A16": ["Linear"]}, version="0.16.0").schemes()[0].weights.strategy == "group"
    assert parse(config_groups={"W8A16": ["Linear"]}).schemes()[0].weights.group_size == 128


@pytest.mark.parametrize("wrapper", ["compression_config", "quantization_config"])
def test_config_that_is_nested_under_an_old_key_is_read(wrapper: str) -> None:
    assert parse(**{wrapper: {"config_groups": {"g": group(INT4)}, "format": "pack-quantized"}}) == parse(
        config_groups={"g": group(INT4)}, format="pack-quantized"
    )


def test_method_names_of_older_files_are_known() -> None:
    for name in ("sparseml", "compressed_tensors"):
        config = quantcore.AutoQuantizationConfig.from_dict({"quant_method": name, "scheme": "W4A16"})
        assert config == CompressedTensorsConfig(scheme="W4A16")


@pytest.mark.parametrize(
    ("given", "strategy", "group_size"),
    [({}, "tensor", None), ({"group_size": -1}, "channel", None), ({"group_size": 64}, "group", 64)],
    ids=["nothing", "minus-one", "64"],
)
def test_strategy_follows_from_the_group_size(given: dict[str, Any], strategy: str, group_size: int | None) -> None:
    weights = parse(config_groups={"g": group({"num_bits": 8, **given})}).schemes()[0].weights
    assert (weights.strategy, weights.group_size) == (strategy, group_size)


def test_spellings_of_older_files_are_translated() -> None:
    weights = {**INT4, "actorder": True, "block_structure": "128x64", "strategy": "group"}
    found = parse(config_groups={"g": group(weights)}, format="fakequant")
    assert found.schemes()[0].weights.actorder == "group"
    assert found.schemes()[0].weights.block_structure == (128, 64)
    assert found.format == "dense"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"solver": "gptq"}, "static"),
        ({"solver": "gptq", "actorder": False}, None),
        ({"solver": "gptq", "actorder": "group"}, "group"),
        ({"actorder": "weight"}, "weight"),
    ],
    ids=str,
)
def test_order_of_columns_of_a_preset_is_that_of_the_solver_unless_given(fields: dict[str, Any], expected: Any) -> None:
    config = CompressedTensorsConfig(scheme="W4A16", **fields)
    assert config.schemes()[0].weights.actorder == expected
    assert parse(scheme="W4A16", **fields) == config
    assert parse(**config.to_dict()) == config
    assert CompressedTensorsConfig(scheme="W8A8", solver="gptq").schemes()[0].weights.actorder is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"actorder": "static", "config_groups": {"g": group(INT4)}}, "actorder needs scheme"),
        ({"dampening_frac": 0.1, "scheme": "W4A16"}, "dampening_frac is of a solver"),
        ({"dampening_frac": 2.0, "scheme": "W4A16", "solver": "gptq"}, r"dampening_frac must lie in \[0, 1\]"),
    ],
    ids=["actorder", "dampening", "range"],
)
def test_setting_of_a_solver_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CompressedTensorsConfig(**fields)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (group({**INT4, "bits": 4}), r"config_groups\['g'\]\.weights has unknown keys bits"),
        (group({**INT4, "num_bits": -4}), r"weights\.num_bits must lie in \[1, 8\]"),
        (group({**INT4, "num_bits": 5, "type": "float"}), r"weights\.num_bits of type float must be one of 4, 6, 8"),
        (group({**INT4, "num_bits": "4"}), r"weights\.num_bits must be int"),
        (group({"strategy": "group"}), r"weights\.group_size is missing"),
        (group({**INT8, "group_size": 32}), r"weights\.group_size 32 contradicts strategy 'channel'"),
        (group({**INT4, "group_size": 0}), r"weights\.group_size must lie in"),
        (group({"strategy": "block"}), r"weights\.block_structure is missing"),
        (group({"strategy": "rows"}), r"weights\.strategy must be one of 'tensor'"),
        (group({"strategy": "token"}), r"weights\.strategy 'token' is one of activations"),
        (group({**INT4, "type": "float", "symmetric": False}), r"weights\.symmetric must be true for floats"),
        (group({**INT8, "dynamic": True}), r"weights\.dynamic must be false"),
        (group(INT8, input_activations={"dynamic": "local"}), r"input_activations\.dynamic 'local' needs"),
        (group(INT4, format="float-quantized"), r"\.format 'float-quantized' cannot store weights that are 4-bit int"),
        (group(INT4, ["re:*"]), r"targets: '\*' is no regular expression"),
        ({"weights": INT4}, r"config_groups\['g'\]\.targets is missing"),
        ({"targets": "Linear", "weights": INT4}, r"targets must be list\[str\]"),
    ],
)
def test_scheme_that_cannot_be_is_refused_by_group_and_key(scheme: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        parse(config_groups={"g": scheme})


def test_groups_that_contradict_each_other_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"groups 'a' and 'b' give target 'Linear' different schemes"):
        parse(config_groups={"a": group(INT4), "b": group(INT8)})
    assert len(parse(config_groups={"a": group(INT4), "b": group(INT4)}).schemes()) == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheme": "W4A15"}, "scheme 'W4A15' is unknown; use one of .*W4A16"),
        ({"format": "packed"}, r"CompressedTensorsConfig\.format must be one of"),
        ({"quantization_status": "done"}, r"CompressedTensorsConfig\.quantization_status must be one of"),
        ({"ignore": ["re:("]}, r"CompressedTensorsConfig\.ignore: '\(' is no regular expression"),
        ({"sparsity_config": {"format": "sparse-1-4"}}, r"sparsity_config\.format must be one of"),
        ({"kv_cache_scheme": {"num_bits": 9}}, r"kv_cache_scheme\.num_bits must lie in"),
        ({"transform_config": {"config_groups": {"R": {"type": "fourier"}}}}, r"config_groups\['R'\]\.type must be"),
        (
            {"transform_config": {"config_groups": {"R": {"type": "hadamard", "head_dim": 0}}}},
            r"config_groups\['R'\]\.head_dim must lie in",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_field_that_cannot_be_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(**fields)


def test_scheme_and_groups_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="scheme and config_groups exclude each other"):
        parse(scheme="W4A16", config_groups={"g": group(INT4)})


def test_loading_attributes_of_a_users_config_reach_the_checkpoints() -> None:
    merge = quantcore.AutoHfQuantizer.merge_quantization_configs
    merged = merge(CompressedTensorsConfig(scheme="FP8"), CompressedTensorsConfig(dequantize=True))
    assert merged == CompressedTensorsConfig(scheme="FP8", dequantize=True)
    assert CompressedTensorsConfig(run_compressed=False).dequantize


def test_properties_tell_what_a_config_holds() -> None:
    config = CompressedTensorsConfig(scheme="FP8_DYNAMIC", quantization_status="compressed")
    assert (config.has_fp8_modules, config.is_quantized, config.is_quantization_compressed) == (True, True, True)
    assert not CompressedTensorsConfig().is_quantized


def test_copied_config_shares_nothing() -> None:
    config = parse(config_groups={"g": group(INT4)}, version="0.19.0")
    twin = copy.deepcopy(config)
    twin.config_groups["g"]["weights"]["num_bits"] = 8
    assert config.schemes()[0].weights.num_bits == 4


@pytest.mark.parametrize(
    ("name", "module", "found"),
    [
        ("model.layers.0.mlp.up_proj", nn.Linear(2, 2), "pattern"),
        ("model.layers.0.self_attn.q_proj", nn.Linear(2, 2), "name"),
        ("model.layers.1.self_attn.q_proj", nn.Linear(2, 2), "class"),
        ("model.layers.1.mlp.down_proj", nn.Linear(2, 2), "prefix"),
        ("model.norm", nn.LayerNorm(2), None),
    ],
)
def test_first_matching_target_gives_the_scheme(name: str, module: nn.Module, found: str | None) -> None:
    targets = {
        "class": "Linear",
        "name": "model.layers.0.self_attn.q_proj",
        "pattern": "re:.*up_proj$",
        "prefix": r"re:model\.layers\.1\.mlp",
    }
    groups = {
        name: group({**INT8, "num_bits": bits}, [target]) for bits, (name, target) in enumerate(targets.items(), 4)
    }
    scheme = scheme_of(name, module, parse(config_groups=groups).schemes())
    assert (scheme.group if scheme else None) == found
