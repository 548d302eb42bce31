"""HqqConfig in its published spellings, and the settings that each layer gets."""

from __future__ import annotations

import pytest
import torch

from quantcore import AutoHfQuantizer, AutoQuantizationConfig
from quantcore_hqq.hqq.config import HqqConfig
from quantcore_hqq.hqq.format import Hqq
from quantcore_hqq.hqq.quantizer import HqqQuantizer, layer_tag

DEFAULT = {
    "quant_method": "hqq",
    "quant_config": {
        "weight_quant_params": {
            "nbits": 4,
            "channel_wise": True,
            "group_size": 64,
            "optimize": True,
            "round_zero": True,
            "axis": 1,
            "view_as_float": False,
        },
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    },
    "skip_modules": ["lm_head"],
}


def format_of(config: HqqConfig, name: str = "model.layers.0.mlp.up_proj") -> Hqq | None:
    quantizer = AutoHfQuantizer.from_config(config)
    assert isinstance(quantizer, HqqQuantizer)
    return quantizer.format_for(name, torch.nn.Linear(8, 8, dtype=torch.bfloat16))


def test_to_dict_has_the_keys_of_published_files() -> None:
    assert HqqConfig().to_dict() == DEFAULT


def test_round_trip_keeps_every_setting_and_unknown_keys() -> None:
    values = {**DEFAULT, "from_the_future": {"a": 1}}
    config = AutoQuantizationConfig.from_dict(values)
    assert config.to_dict() == values
    assert HqqConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values",
    [
        {"nbits": 3, "group_size": 32, "axis": 0},
        {"quant_config": {"nbits": 3, "group_size": 32, "axis": 0}},
        {"quant_config": {"weight_quant_params": {"nbits": 3, "group_size": 32, "axis": 0}}},
        {"weight_quant_params": {"nbits": 3, "group_size": 32, "axis": 0}},
    ],
    ids=["constructor", "flat", "without offload_meta", "unnested"],
)
def test_older_spellings_mean_the_same(values: dict[str, object]) -> None:
    weight_format = format_of(HqqConfig.from_dict({"quant_method": "hqq", **values}))
    assert (weight_format.bits, weight_format.group_size, weight_format.axis) == (3, 32, 0)


def test_zero_is_rounded_for_four_bits_only() -> None:
    assert format_of(HqqConfig(nbits=4)).round_zero
    assert not format_of(HqqConfig(nbits=3)).round_zero


def test_skip_list_is_not_shared_between_configs() -> None:
    HqqConfig().skip_modules.append("embed")
    assert HqqConfig().skip_modules == ["lm_head"]


def test_layer_tag_drops_model_layers_and_numbers() -> None:
    assert layer_tag("model.layers.3.mlp.up_proj") == "mlp.up_proj"


def test_layers_get_the_settings_of_their_tag() -> None:
    config = HqqConfig(
        dynamic_config={"mlp.up_proj": {"nbits": 3}, "self_attn.q_proj": {"nbits": 8, "group_size": 128}}
    )
    assert format_of(config, "model.layers.0.mlp.up_proj").bits == 3
    assert format_of(config, "model.language_model.layers.7.self_attn.q_proj").group_size == 128
    assert format_of(config, "model.layers.0.mlp.down_proj") is None


def test_compute_dtype_is_the_dtype_of_the_weight() -> None:
    assert format_of(HqqConfig()).compute_dtype == "bfloat16"


def test_skip_patterns_match_anywhere_in_the_name() -> None:
    quantizer = AutoHfQuantizer.from_config(HqqConfig(skip_modules=["up_"]))
    assert isinstance(quantizer, HqqQuantizer)
    assert quantizer.skips("model.layers.0.mlp.up_proj", "up_")


@pytest.mark.parametrize(
    ("values", "error", "field"),
    [
        ({"nbits": 7}, ValueError, "nbits"),
        ({"nbits": -4}, ValueError, "nbits"),
        ({"nbits": True}, TypeError, "nbits"),
        ({"nbits": "4"}, TypeError, "nbits"),
        ({"nbits": float("nan")}, ValueError, "nbits"),
        ({"group_size": 12}, ValueError, "group_size"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": 2**62}, ValueError, "group_size"),
        ({"group_size": 64.0}, TypeError, "group_size"),
        ({"axis": 2}, ValueError, "axis"),
        ({"view_as_float": 1}, TypeError, "view_as_float"),
        ({"skip_modules": "lm_head"}, TypeError, "skip_modules"),
        ({"quant_config": {}}, ValueError, "quant_config"),
        ({"quant_config": [4]}, TypeError, "quant_config"),
        ({"quant_config": {"weight_quant_params": {"group_size": 64}}}, ValueError, "nbits"),
        ({"quant_config": {"weight_quant_params": None}}, TypeError, "quant_config"),
        ({"quant_config": {"mlp.up_proj": {"deep": {"er": 1}}}}, TypeError, "mlp.up_proj"),
        ({"dynamic_config": {"mlp.up_proj": {"bits": 4}}}, ValueError, "bits"),
        ({"dynamic_config": {"mlp.up_proj": 4}}, TypeError, "dynamic_config"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_impossible_value_is_refused_by_field(values: dict[str, object], error: type[Exception], field: str) -> None:
    with pytest.raises(error, match=field):
        HqqConfig.from_dict({"quant_method": "hqq", **values})


def test_update_leaves_the_config_as_it_was_when_it_fails() -> None:
    config = HqqConfig()
    with pytest.raises(TypeError, match="skip_modules"):
        config.update(skip_modules=4)
    assert config.to_dict() == DEFAULT
