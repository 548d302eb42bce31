"""BitsAndBytesConfig and the choice of its quantizer."""

from __future__ import annotations

import pytest
import torch

from quantcore import AutoHfQuantizer, AutoQuantizationConfig
from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig
from quantcore_bnb.bitsandbytes.quantizer import Bnb4BitQuantizer

THIRTEEN_KEYS = {
    "quant_method": "bitsandbytes",
    "_load_in_8bit": False,
    "_load_in_4bit": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "load_in_4bit": True,
    "load_in_8bit": False,
}


def test_to_dict_has_the_keys_of_published_files() -> None:
    assert BitsAndBytesConfig(load_in_4bit=True).to_dict() == THIRTEEN_KEYS


def test_round_trip_keeps_every_field_and_unknown_keys() -> None:
    values = {**THIRTEEN_KEYS, "bnb_4bit_compute_dtype": "bfloat16", "from_the_future": [1]}
    config = AutoQuantizationConfig.from_dict(values)
    assert config.to_dict() == values
    assert BitsAndBytesConfig.from_dict(config.to_dict()) == config


def test_dtypes_are_held_as_torch_dtypes() -> None:
    config = BitsAndBytesConfig(bnb_4bit_compute_dtype="torch.bfloat16", bnb_4bit_quant_storage=torch.float16)
    assert (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_storage) == (torch.bfloat16, torch.float16)


def test_absent_dtypes_become_float32_and_uint8() -> None:
    config = BitsAndBytesConfig()
    assert (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_storage) == (torch.float32, torch.uint8)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError),
        ({"load_in_4bit": 1}, TypeError),
        ({"llm_int8_threshold": 6}, TypeError),
        ({"llm_int8_threshold": float("nan")}, ValueError),
        ({"llm_int8_threshold": -1.0}, ValueError),
        ({"llm_int8_skip_modules": "lm_head"}, TypeError),
        ({"llm_int8_skip_modules": [["lm_head"]]}, TypeError),
        ({"bnb_4bit_quant_type": "int4"}, ValueError),
        ({"bnb_4bit_quant_type": 4}, TypeError),
        ({"bnb_4bit_compute_dtype": "bf16"}, ValueError),
        ({"bnb_4bit_compute_dtype": "nn"}, ValueError),
        ({"bnb_4bit_compute_dtype": "int32"}, ValueError),
        ({"bnb_4bit_compute_dtype": [1]}, TypeError),
        ({"bnb_4bit_quant_storage": "int32"}, ValueError),
    ],
    ids=str,
)
def test_impossible_value_is_refused_by_field(values: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"BitsAndBytesConfig.{next(iter(values))}"):
        BitsAndBytesConfig.from_dict(values)


def test_setting_both_flags_later_is_refused() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_8bit"):
        config.load_in_8bit = True
    assert config.load_in_8bit is False


@pytest.mark.parametrize(
    ("flags", "name"),
    [({"load_in_8bit": True}, "llm_int8"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"), ({}, None)],
)
def test_quantization_method_names_the_numeric_form(flags: dict[str, object], name: str | None) -> None:
    config = BitsAndBytesConfig(**flags)
    assert config.quantization_method() == name
    assert config.is_quantizable() is (name is not None)


@pytest.mark.parametrize("config", [{"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 6.0}])
def test_files_without_a_method_are_recognised(config: dict[str, object]) -> None:
    assert isinstance(AutoQuantizationConfig.from_dict(config), BitsAndBytesConfig)


def test_no_flag_means_four_bits_and_the_saved_config_says_so() -> None:
    config = BitsAndBytesConfig.from_dict({"bnb_4bit_quant_type": "nf4"})
    quantizer = AutoHfQuantizer.from_config(config)
    assert isinstance(quantizer, Bnb4BitQuantizer)
    assert quantizer.quantization_config.load_in_4bit
    assert not config.load_in_4bit


def test_diff_holds_only_what_was_changed() -> None:
    diff = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_diff_dict()
    assert diff == {"load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
