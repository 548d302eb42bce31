"""GPTQConfig in its published spellings, and the settings and formats that each layer gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantcore import AutoHfQuantizer, AutoQuantizationConfig
from quantcore.formats.base import WeightFormat
from quantcore_gptq.gptq.config import GPTQConfig
from quantcore_gptq.gptq.format import Gptq
from quantcore_gptq.gptq.quantizer import GptqQuantizer
from quantcore_gptq.marlin import Marlin

UPSTREAM_KEYS = {
    *("quant_method", "bits", "tokenizer", "dataset", "group_size", "damp_percent", "desc_act", "act_group_aware"),
    *("sym", "true_sequential", "format", "meta", "backend", "model_seqlen", "block_name_to_quantize"),
    *("module_name_preceding_first_block", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs"),
    *("modules_in_block_to_quantize", "checkpoint_format"),
}


def format_of(
    values: dict[str, Any], name: str = "model.layers.0.mlp.up_proj", *, stored: bool = True
) -> WeightFormat | None:
    quantizer = AutoHfQuantizer.from_config({"quant_method": "gptq", **values}, pre_quantized=stored)
    assert isinstance(quantizer, GptqQuantizer)
    return quantizer.format_for(name, torch.nn.Linear(64, 64, device="meta"))


def test_to_dict_has_the_keys_that_transformers_writes() -> None:
    assert GPTQConfig(bits=4).to_dict().keys() == UPSTREAM_KEYS


def test_keys_of_other_tools_survive_a_round_trip() -> None:
    values = {
        "quant_method": "gptq",
        "bits": 4,
        "dynamic": {"-:lm_head": {}},
        "lm_head": True,
        "pack_dtype": "int32",
        "static_groups": True,
        "use_exllama": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    config = AutoQuantizationConfig.from_dict(values)
    assert config.to_dict().items() >= values.items()
    assert GPTQConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"w_bit": 3, "q_group_size": 64}, {"bits": 3, "group_size": 64}),
        ({"wbits": 8, "group_size": -1}, {"bits": 8, "group_size": -1}),
        ({"bits": 4, "checkpoint_format": "gptq_v2"}, {"format": "gptq_v2"}),
        ({"bits": 4, "format": "GPTQ_V2"}, {"format": "gptq_v2"}),
        ({"bits": 4, "is_marlin_format": True}, {"format": "marlin"}),
        ({"bits": 4, "quant_method": "marlin"}, {"format": "marlin"}),
        ({"bits": 5}, {"format": "gptq_p"}),
        ({"bits": 4, "desc_act": None, "backend": None}, {"desc_act": False, "backend": "auto"}),
        ({"bits": 4, "desc_act": True}, {"act_group_aware": False}),
    ],
)
def test_older_spellings_mean_the_same(values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = GPTQConfig.from_dict(values)
    assert {name: getattr(config, name) for name in expected} == expected


def test_layout_that_was_published_as_a_method_is_gptq() -> None:
    config = AutoQuantizationConfig.from_dict({"quant_method": "marlin", "bits": 4, "group_size": 128})
    assert isinstance(config, GPTQConfig)
    assert (config.format, config.to_dict()["quant_method"]) == ("marlin", "gptq")


def test_file_without_a_method_is_recognised() -> None:
    values = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True}
    assert type(AutoQuantizationConfig.from_dict(values)) is GPTQConfig


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"bits": "4"}, "bits"),
        ({"bits": -4}, "bits"),
        ({"bits": True}, "bits"),
        ({"bits": 5, "format": "gptq"}, "bits"),
        ({"bits": 4, "group_size": 0}, "group_size"),
        ({"bits": 4, "group_size": -2}, "group_size"),
        ({"bits": 4, "group_size": 1 << 62}, "group_size"),
        ({"bits": 4, "damp_percent": 0.0}, "damp_percent"),
        ({"bits": 4, "damp_percent": float("nan")}, "damp_percent"),
        ({"bits": 4, "dataset": "my-corpus"}, "dataset"),
        ({"bits": 4, "format": "gguf"}, "format"),
        ({"bits": 4, "dynamic": {"(": {}}}, "dynamic"),
        ({"bits": 4, "dynamic": {"lm_head": {"bits": 9}}}, "bits"),
        ({"bits": 4, "dynamic": {"lm_head": {"group_size": 0}}}, "group_size"),
        ({"bits": 4, "dynamic": {"lm_head": {"mse": float("inf")}}}, "mse"),
    ],
)
def test_impossible_value_raises_value_error_naming_the_field(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GPTQConfig(**values)


@pytest.mark.parametrize("values", [{"group_size": "128"}, {"format": 3}, {"sym": "yes"}, {"dynamic": {"a": 4}}])
def test_wrong_type_raises_type_error(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(values))):
        GPTQConfig(bits=4, **values)


def test_bits_are_required() -> None:
    with pytest.raises(TypeError):
        GPTQConfig()  # type: ignore[call-arg]


def test_loading_attributes_are_those_of_upstream() -> None:
    assert GPTQConfig(bits=4, backend="marlin").get_loading_attributes() == {
        "backend": "marlin",
        "max_input_length": None,
    }


DYNAMIC = {
    "bits": 4,
    "group_size": 32,
    "dynamic": {
        r"-:model\.layers\.0\.mlp\.down_proj": {},
        r"+:.*self_attn\.v_proj": {"bits": 8, "group_size": 64},
        r".*self_attn": {"sym": False},
    },
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.down_proj", None),
        ("model.layers.1.mlp.down_proj", (4, 32, True)),
        ("model.layers.0.self_attn.v_proj", (8, 64, True)),
        ("model.layers.0.self_attn.q_proj", (4, 32, False)),
    ],
)
def test_first_override_that_matches_counts(name: str, expected: tuple[int, int, bool] | None) -> None:
    found = format_of(DYNAMIC, name)
    assert (found and (found.bits, found.group_size, found.sym)) == expected


@pytest.mark.parametrize(
    ("values", "zeros", "planar"),
    [
        ({"bits": 4}, "v1-words", False),
        ({"bits": 4, "format": "gptq_v2"}, "v2", False),
        ({"bits": 4, "format": "gptq_p"}, "v2", True),
        ({"bits": 4, "dynamic": {"x": {"bits": 6}}}, "v2", True),
        ({"bits": 4, "model_file_base_name": "model"}, "v1", False),
        ({"bits": 4, "use_exllama": True, "meta": {"quantizer": ["optimum:1", "gptqmodel:2"]}}, "v1-words", False),
    ],
)
def test_zero_points_are_stored_as_the_tool_stores_them(values: dict[str, Any], zeros: str, planar: bool) -> None:
    found = format_of(values)
    assert isinstance(found, Gptq)
    assert (found.zeros, found.planar) == (zeros, planar)


def test_marlin_is_a_layout_of_its_own() -> None:
    assert format_of({"bits": 4, "is_marlin_format": True, "group_size": -1}) == Marlin(group_size=-1)


@pytest.mark.parametrize("values", [{"bits": 8, "format": "marlin"}, {"bits": 4, "format": "bitblas"}])
def test_layout_that_is_not_read_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"GPTQConfig\.format"):
        format_of(values)
