"""The config of AutoRound: every spelling that checkpoints use, overrides by layer, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from quantcore_gptq.auto_round.config import AutoRoundConfig
from quantcore_gptq.auto_round.format import AutoRoundAwq, AutoRoundGptq
from quantcore_gptq.auto_round.quantizer import AutoRoundQuantizer

LINEAR = nn.Linear(64, 64, device="meta")


def config(**values: Any) -> AutoRoundConfig:
    found = AutoRoundConfig.from_dict({"quant_method": "auto-round", **values})
    assert isinstance(found, AutoRoundConfig)
    return found


@pytest.mark.parametrize(
    ("values", "packing"),
    [
        ({}, "gptq"),
        ({"packing_format": "auto_round:auto_gptq"}, "gptq"),
        ({"packing_format": "auto_round:gptq:exllamav2"}, "gptq"),
        ({"packing_format": "auto_round"}, "native"),
        ({"packing_format": "auto_round:gptqmodel"}, "native"),
        ({"packing_format": "autoround:exllamav2"}, "native"),
        ({"packing_format": "auto_round:auto_awq"}, "awq"),
        ({"backend": "auto_round:awq"}, "awq"),
        ({"backend": "auto_round:exllamav2"}, "native"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq", "version": "gemm"}, "awq"),
    ],
    ids=str,
)
def test_every_spelling_names_its_layout(values: dict[str, Any], packing: str) -> None:
    assert config(**values).packing == packing


def test_missing_settings_have_the_defaults() -> None:
    found = config(bits=None, sym=None, group_size=None)
    assert (found.bits, found.sym, found.group_size, found.backend) == (4, True, 128, "auto")


@pytest.mark.parametrize("values", [{"packing_format": "auto_round:llm_compressor"}, {"data_type": "mx_fp"}], ids=str)
def test_layouts_of_other_methods_are_refused_by_name(values: dict[str, Any]) -> None:
    quantizer = AutoRoundQuantizer(config(**values))
    with pytest.raises(ValueError, match=r"is no layout of integers.*compressed-tensors"):
        quantizer.format_for("model.layers.0.fc", LINEAR)


def test_extra_config_overrides_by_name_before_expression() -> None:
    found = config(extra_config={"layers.1.fc": {"bits": 8}, r"layers\.\d+\.fc": {"bits": 2}, "*v_proj": {"bits": 16}})
    settings = [found.for_layer(name) for name in ("layers.0.fc", "layers.1.fc", "layers.0.v_proj", "layers.0.q_proj")]
    assert [None if setting is None else setting.bits for setting in settings] == [2, 8, None, 4]


@pytest.mark.parametrize(
    "blocks",
    ["model.layers", "model.layers, vision.blocks", ["model.layers"], [["model.layers.0", "model.layers.1"]]],
    ids=str,
)
def test_blocks_are_named_in_strings_or_lists(blocks: Any) -> None:
    found = config(block_name_to_quantize=blocks)
    assert found.is_in_blocks("model.layers.1.fc")
    assert not found.is_in_blocks("lm_head")


def test_older_keys_name_the_blocks_too() -> None:
    assert not config(to_quant_block_names=[["model.layers.0"]]).is_in_blocks("model.layers.1.fc")


def test_json_keeps_what_was_given_and_adds_nothing_of_auto_round() -> None:
    given = {"bits": 4, "iters": 50, "amp": True, "autoround_version": "0.16.1", "extra_config": {"a": {"bits": 8}}}
    written = config(**given).to_dict()
    assert {key: written[key] for key in given} == given
    assert "nsamples" not in written
    assert AutoRoundConfig.from_dict(written) == config(**given)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 9}, "AutoRoundConfig.bits must be one of"),
        ({"bits": True}, "AutoRoundConfig.bits must be int"),
        ({"group_size": 0}, "AutoRoundConfig.group_size must be -1 or a multiple"),
        ({"group_size": "a"}, "AutoRoundConfig.group_size must be int"),
        ({"iters": -1}, "AutoRoundConfig.iters must lie in"),
        ({"extra_config": {"fc": 3}}, "must be a dict of overrides"),
        ({"extra_config": {"fc": {"bits": 12}}}, "bits must be in"),
        ({"extra_config": {"(": {"bits": 4}}}, "is no regular expression"),
        ({"extra_config": {"fc": {"group_size": 0}}}, "group_size must be -1 or a multiple"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        config(**values)


@pytest.mark.parametrize(
    ("values", "packing", "kind"),
    [
        ({}, "auto_round:auto_gptq", AutoRoundGptq),
        ({"sym": False}, "auto_round:auto_awq", AutoRoundAwq),
        ({"sym": False, "bits": 3}, "auto_round", AutoRoundGptq),
        ({"sym": False, "extra_config": {"fc": {"bits": 8}}}, "auto_round", AutoRoundGptq),
        ({"sym": False, "packing_format": "auto_round:auto_gptq"}, "auto_round:auto_gptq", AutoRoundGptq),
    ],
    ids=str,
)
def test_new_checkpoints_get_the_layout_that_auto_round_chooses(
    values: dict[str, Any], packing: str, kind: type
) -> None:
    quantizer = AutoRoundQuantizer(config(**values), pre_quantized=False)
    assert quantizer.quantization_config.packing_format == packing
    assert type(quantizer.format_for("model.layers.0.q", LINEAR)) is kind


def test_sides_that_are_no_multiple_of_32_stay_float() -> None:
    quantizer = AutoRoundQuantizer(config(), pre_quantized=False)
    assert quantizer.format_for("fc", nn.Linear(48, 64, device="meta")) is None
    assert quantizer.format_for("fc", nn.Linear(64, 33, device="meta")) is None


def test_learning_rates_follow_the_number_of_steps() -> None:
    assert AutoRoundQuantizer(config(), pre_quantized=False).schedule.rate == 1 / 200
    few_bits = AutoRoundQuantizer(config(bits=2, iters=1000), pre_quantized=False).schedule
    assert (few_bits.rate, few_bits.range_rate) == (2 / 1000, 2 / 1000)
    given = AutoRoundQuantizer(config(lr=0.5, minmax_lr=0.25), pre_quantized=False).schedule
    assert (given.rate, given.range_rate) == (0.5, 0.25)
