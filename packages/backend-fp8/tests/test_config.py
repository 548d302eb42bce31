"""Configs of fp8, mxfp8 and fbgemm_fp8: every dialect that checkpoints are published in, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import quantcore
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore_fp8.fbgemm_fp8.config import FbgemmFp8Config
from quantcore_fp8.format import ROW_INPUT, TENSOR
from quantcore_fp8.fp8.config import FineGrainedFP8Config

DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
VLLM = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], "kv_cache_scheme": None}
MINIMAX = {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]}


def format_of(config: dict[str, Any], name: str = "model.layers.0.mlp.up_proj") -> Any:
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    return quantizer.format_for(name, torch.nn.Linear(256, 128, device="meta"))  # type: ignore[attr-defined]


def test_defaults_are_upstreams() -> None:
    config = FineGrainedFP8Config()
    assert config.to_dict() == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "dequantize": False,
        "modules_to_not_convert": None,
        "modules_to_convert": None,
        "scale_fmt": "float",
        "expert_dtype": "fp8",
    }
    assert FbgemmFp8Config().to_dict() == {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": None,
    }


@pytest.mark.parametrize("config", [DEEPSEEK, VLLM, MINIMAX], ids=["deepseek", "vllm", "minimax"])
def test_published_dict_survives_a_round_trip(config: dict[str, Any]) -> None:
    parsed = FineGrainedFP8Config.from_dict(config)
    assert parsed.to_dict().items() >= config.items()
    assert FineGrainedFP8Config.from_dict(parsed.to_dict()) == parsed


def test_one_class_keeps_the_method_it_was_given() -> None:
    assert FineGrainedFP8Config.from_dict(MINIMAX).quant_method == "mxfp8"
    assert FineGrainedFP8Config.from_dict(DEEPSEEK).quant_method == "fp8"
    assert FineGrainedFP8Config().quant_method == "fp8"


def test_ignored_layers_is_another_name_of_the_skip_list() -> None:
    assert FineGrainedFP8Config.from_dict(VLLM).modules_to_not_convert == ["lm_head"]
    both = {**VLLM, "modules_to_not_convert": ["model.embed_tokens"]}
    assert FineGrainedFP8Config.from_dict(both).modules_to_not_convert == ["model.embed_tokens"]


@pytest.mark.parametrize(
    ("config", "block"),
    [
        ({"quant_method": "fp8"}, (128, 128)),
        ({"quant_method": "mxfp8"}, (1, 32)),
        (VLLM, None),
        ({**VLLM, "weight_block_size": [128, 128]}, (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": None}, None),
    ],
    ids=["fp8", "mxfp8", "vllm", "vllm-blocks", "null"],
)
def test_absent_block_size_means_what_the_dialect_says(config: dict[str, Any], block: object) -> None:
    found = FineGrainedFP8Config.from_dict(config)
    assert isinstance(found, FineGrainedFP8Config)
    assert found.block == block


@pytest.mark.parametrize("block", [[128, 128], [1, 64], [32, 1], None], ids=str)
def test_mxfp8_has_no_other_block(block: Any) -> None:
    with pytest.raises(ValueError, match=r"weight_block_size of mxfp8 must be \[1, 32\].*use quant_method 'fp8'"):
        FineGrainedFP8Config.from_dict({**MINIMAX, "weight_block_size": block})
    found = FineGrainedFP8Config.from_dict(MINIMAX)
    assert isinstance(found, FineGrainedFP8Config)
    with pytest.raises(ValueError, match="weight_block_size of mxfp8"):
        found.update(weight_block_size=block)


def test_scheme_is_read_in_any_case() -> None:
    assert FineGrainedFP8Config(activation_scheme="STATIC").activation_scheme == "static"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"activation_scheme": "sometimes"}, ValueError),
        ({"activation_scheme": 8}, TypeError),
        ({"weight_block_size": (128,)}, ValueError),
        ({"weight_block_size": [128, 128, 128]}, ValueError),
        ({"weight_block_size": (0, 128)}, ValueError),
        ({"weight_block_size": 128}, TypeError),
        ({"weight_block_size": ("a", "b")}, TypeError),
        ({"scale_fmt": "e8m0"}, ValueError),
        ({"expert_dtype": "int4"}, ValueError),
        ({"modules_to_not_convert": "lm_head"}, TypeError),
    ],
    ids=str,
)
def test_impossible_field_is_refused_by_name(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"FineGrainedFP8Config.{next(iter(fields))}"):
        FineGrainedFP8Config(**fields)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("inf"), "1200"], ids=repr)
def test_impossible_bound_is_refused_by_name(bound: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="activation_scale_ub"):
        FbgemmFp8Config(activation_scale_ub=bound)


def test_user_without_a_skip_list_keeps_that_of_the_checkpoint() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs(
        {**DEEPSEEK, "modules_to_not_convert": ["lm_head", "mlp.gate"]}, FineGrainedFP8Config(dequantize=True)
    )
    assert merged.to_dict()["dequantize"] is True
    assert merged.to_dict()["modules_to_not_convert"] == ["lm_head", "mlp.gate"]


def test_user_may_lower_the_bound_of_a_checkpoint() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs({"quant_method": "fbgemm_fp8"}, FbgemmFp8Config(50.0))
    assert merged.to_dict()["activation_scale_ub"] == 50.0


def test_router_is_skipped_and_gate_projection_is_not() -> None:
    quantizer = AutoHfQuantizer.from_config({**DEEPSEEK, "modules_to_not_convert": ["mlp.gate"]})
    assert quantizer.skips("model.layers.0.mlp.gate", "mlp.gate")  # type: ignore[attr-defined]
    assert not quantizer.skips("model.layers.0.mlp.gate_proj", "mlp.gate")  # type: ignore[attr-defined]


def test_each_dialect_stores_its_own_tensors() -> None:
    names = {
        "deepseek": [spec.name for spec in format_of(DEEPSEEK).tensor_specs((128, 256))],
        "vllm": [spec.name for spec in format_of(VLLM).tensor_specs((128, 256))],
    }
    assert names == {"deepseek": ["weight", "weight_scale_inv"], "vllm": ["weight", "weight_scale", "input_scale"]}
    assert format_of(MINIMAX).scale.dtype == "uint8"
    assert format_of({**MINIMAX, "scale_fmt": "ue8m0"}).scale.dtype == "float8_e8m0fnu"


def test_inputs_follow_the_granularity_of_weights() -> None:
    assert format_of({**DEEPSEEK, "weight_block_size": [128, 64]}).input.group_size == 64
    assert format_of({**DEEPSEEK, "scale_fmt": "ue8m0"}).input.scale == "e8m0-round_up"
    assert format_of({"quant_method": "fp8", "scale_fmt": "ue8m0"}).input.scale == "float32"
    assert format_of({"quant_method": "fp8", "weight_block_size": None}).input == ROW_INPUT


def test_only_routed_experts_are_fp4() -> None:
    config = {**DEEPSEEK, "expert_dtype": "fp4", "scale_fmt": "ue8m0"}
    elements = {
        "model.layers.3.mlp.experts.11.gate_proj": "e2m1",
        "model.layers.3.mlp.shared_experts.gate_proj": "e4m3",
        "model.layers.3.self_attn.o_proj": "e4m3",
    }
    assert {name: format_of(config, name).element.name for name in elements} == elements


def test_static_scheme_asks_for_calibration_data() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    with pytest.raises(ValueError, match="calibration"):
        quantcore.quantize(model, {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})


def test_whole_tensor_has_no_block() -> None:
    assert format_of({"quant_method": "fp8", "weight_block_size": None}).block == TENSOR
