"""The config of AWQ: published spellings, their JSON, and what is refused by field."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quantcore import AutoHfQuantizer, AutoQuantizationConfig
from quantcore_gptq.awq.config import AwqConfig
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.gptq.config import GPTQConfig

PUBLISHED = {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}


def read(**values: Any) -> AwqConfig:
    config = AutoQuantizationConfig.from_dict({**PUBLISHED, **values})
    assert isinstance(config, AwqConfig)
    return config


def format_of(config: AwqConfig, name: str = "model.layers.0.mlp.up_proj", dtype: torch.dtype = torch.float16) -> Any:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    return quantizer.format_for(name, nn.Linear(256, 256, device="meta", dtype=dtype))


def test_config_is_a_gptq_config_as_in_transformers() -> None:
    assert isinstance(AwqConfig(), GPTQConfig)


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ({"version": "GEMM"}, "gemm"),
        ({"version": "GEMV"}, "gemv"),
        ({"version": "GEMV_FAST"}, "gemv_fast"),
        ({"version": None, "format": "gemv"}, "gemv"),
        ({"version": None, "format": None, "checkpoint_format": "llm-awq"}, "llm-awq"),
        ({"version": "gemv", "format": "gemm"}, "gemv"),
        ({"version": None, "backend": "llm-awq"}, "llm-awq"),
        ({"version": "exllama"}, "gemm"),
        ({"version": "ipex"}, "gemm"),
        ({"version": None}, "gemm"),
    ],
    ids=str,
)
def test_every_spelling_of_the_layout_is_read(values: dict[str, Any], layout: str) -> None:
    assert read(**values).layout == layout


def test_keys_of_autoawqs_own_file_are_read() -> None:
    config = AwqConfig.from_dict({"zero_point": False, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    assert (config.bits, config.group_size, config.zero_point) == (4, 64, False)
    assert "w_bit" not in config.to_dict()


def test_zero_point_decides_and_sym_only_where_it_is_absent() -> None:
    assert read(sym=True).zero_point
    assert AwqConfig.from_dict({"bits": 4, "sym": True}).zero_point is False


def test_keys_of_fused_modules_and_of_gptqmodel_survive() -> None:
    extra = {"do_fuse": True, "fuse_max_seq_len": 512, "exllama_config": {"version": 2}, "checkpoint_format": "gemm"}
    config = read(**extra, method="awq", pack_dtype="int32", desc_act=False, lm_head=False)
    assert config.to_dict().items() >= {**extra, "method": "awq", "pack_dtype": "int32", "lm_head": False}.items()
    assert AutoQuantizationConfig.from_dict(config.to_dict()) == config


def test_backend_of_autoawq_becomes_auto() -> None:
    assert read(backend="autoawq").backend == "auto"
    assert read(backend=None).backend == "auto"


def test_json_null_stands_for_the_default() -> None:
    assert read(bits=None, group_size=None, zero_point=None) == read()


def test_format_and_version_change_together() -> None:
    config = AwqConfig()
    config.update(format="gemv")
    assert (config.format, config.version) == ("gemv", "gemv")


@pytest.mark.parametrize(
    ("values", "error", "field"),
    [
        ({"bits": 1}, ValueError, "bits"),
        ({"bits": -4}, ValueError, "bits"),
        ({"bits": "4"}, (TypeError, ValueError), "bits"),
        ({"bits": 8, "version": "gemv"}, ValueError, "bits"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": -5}, ValueError, "group_size"),
        ({"group_size": 2**62}, ValueError, "group_size"),
        ({"group_size": 64.0}, TypeError, "group_size"),
        ({"zero_point": 1}, TypeError, "zero_point"),
        ({"version": "gemx"}, ValueError, "gemx"),
        ({"version": 4}, TypeError, "version|format"),
        ({"backend": ""}, ValueError, "backend"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"modules_to_not_convert": "lm_head"}, TypeError, "modules_to_not_convert"),
        ({"version": "marlin"}, ValueError, "zero_point"),
    ],
    ids=str,
)
def test_impossible_value_is_refused_by_field(values: dict[str, Any], error: Any, field: str) -> None:
    with pytest.raises(error, match=field):
        read(**values)


def test_refused_update_leaves_layout_and_backend_as_they_were() -> None:
    config = AwqConfig(bits=8)
    before = config.to_dict()
    with pytest.raises(ValueError, match="bits"):
        config.update(version="gemv")
    assert config.to_dict() == before


def test_layers_get_formats_by_the_config() -> None:
    assert format_of(read(group_size=64)) == Awq(group_size=64)
    assert format_of(read(), dtype=torch.bfloat16).scale_dtype == "bfloat16"
    assert format_of(read(), dtype=torch.float32).scale_dtype == "float16"
    assert format_of(read(version="marlin", zero_point=False)) == AwqMarlin(128)


def test_overrides_of_gptqmodel_are_heeded_by_name() -> None:
    dynamic = {"-:.*down_proj": {}, "+:.*up_proj": {"bits": 8, "group_size": 32}}
    assert format_of(read(dynamic=dynamic)).bits == 8
    assert format_of(read(dynamic=dynamic), "model.layers.0.mlp.down_proj") is None


def test_only_four_bits_are_interleaved_but_in_exports_of_auto_round() -> None:
    assert format_of(read()).interleaved
    assert not format_of(read(bits=5)).interleaved
    assert format_of(read(bits=5, provider="auto-round")).interleaved
    assert not format_of(read(bits=8, provider="auto-round")).interleaved
