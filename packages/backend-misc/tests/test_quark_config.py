"""The config of quark: files of every age, errors that name the key, and which layer gets which spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantcore import AutoQuantizationConfig
from quantcore.testing.golden import golden_folder
from quantcore_misc.quark.config import QuarkConfig
from quantcore_misc.quark.quantizer import QuarkQuantizer, format_of
from quantcore_misc.quark.spec import LayerSpec, TensorQuant
from quantcore_misc.quark.weight import QuarkWeight

GOLDEN = golden_folder("quark", Path(__file__).parents[3] / "tests" / "golden")
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True}
UINT4 = {"dtype": "uint4", "qscheme": "per_group", "group_size": 32, "symmetric": False}
MX = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": True}


def config(weight: Any = FP8, **fields: Any) -> QuarkConfig:
    given = {"quant_method": "quark", "exclude": [], "global_quant_config": {"weight": weight}, **fields}
    found = QuarkConfig.from_dict(given)
    assert isinstance(found, QuarkConfig)
    return found


def spec(found: QuarkConfig, name: str = "model.layers.0.mlp", kind: str = "Linear") -> LayerSpec:
    layer = found.for_layer(name, kind)
    assert layer is not None
    return layer


@pytest.mark.parametrize(
    "file",
    [*GOLDEN.glob("*.json"), *GOLDEN.glob("checkpoint-*/config.json")],
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_published_config_survives_a_round_trip(file: Path) -> None:
    given = json.loads(file.read_text())["quantization_config"]
    found = AutoQuantizationConfig.from_dict(given)
    assert isinstance(found, QuarkConfig)
    assert json.loads(json.dumps(found.to_dict())) == given
    assert AutoQuantizationConfig.from_dict(found.to_dict()) == found


def test_old_file_holds_nulls_and_no_export() -> None:
    given = {
        "quant_method": "quark",
        "exclude": None,
        "global_quant_config": {"weight": UINT4, "input_tensors": None},
        "layer_quant_config": None,
        "layer_type_quant_config": None,
        "kv_cache_quant_config": None,
    }
    found = QuarkConfig.from_dict(given)
    assert isinstance(found, QuarkConfig)
    assert (found.legacy, found.pack_method, found.custom_mode) == (True, "reorder", "quark")
    assert spec(found, "lm_head").weight is not None
    assert QuarkQuantizer(found).skip_patterns == []


def test_first_fitting_pattern_goes_before_types_and_the_rest() -> None:
    found = config(
        FP8,
        exclude=["*.router", "lm_head"],
        layer_quant_config={"*k_proj": {"weight": UINT4}, "*proj": {"weight": MX}, "*.float": {"weight": None}},
        layer_type_quant_config={"Conv1D": {"weight": None}},
        kv_cache_quant_config={"*v_cache": {"weight": FP8, "output_tensors": FP8}},
    )
    elements = {name: spec(found, name).weight.element for name in ("a.k_proj", "a.v_proj", "a.mlp")}  # type: ignore[union-attr]
    assert elements == {"a.k_proj": "uint4", "a.v_proj": "e2m1", "a.mlp": "e4m3"}
    assert spec(found, "a.v_cache").output is not None
    left = [("a.router", "Linear"), ("lm_head", "Linear"), ("a.float", "Linear"), ("a.mlp", "Conv1D")]
    assert [found.for_layer(*each) for each in left] == [None] * 4


def test_patterns_match_whole_names_and_tell_cases_apart() -> None:
    found = config(exclude=["head", "*.Gate"])
    assert found.for_layer("head", "Linear") is None
    assert found.for_layer("lm_head", "Linear") is not None
    assert found.for_layer("mlp.gate", "Linear") is not None


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ({"dtype": "fp8_e5m2", "qscheme": "per_channel"}, {"element": "e5m2", "strategy": "channel"}),
        ({**MX, "scale_calculation_mode": "ceil"}, {"scale": "e8m0", "mode": "ceil", "group_size": 32}),
        ({**MX, "scale_format": None, "scale_type": "float8_e5m3", "group_size": 16}, {"scale": "e5m3"}),
        ({**MX, "scale_format": None, "scale_type": "float8_e8m0fnu"}, {"scale": "e8m0"}),
        ([{**MX, "scale_format": "float32"}, {**FP8, "is_scale_quant": True}], {"scale": "e4m3", "is_dynamic": True}),
        ({"dtype": "mx", "mx_element_dtype": "fp4"}, {"element": "e2m1", "scale": "e8m0", "group_size": 32}),
        ([FP8, {**UINT4, "dtype": "int4"}], {"element": "int4", "is_progressive": True, "group_size": 32}),
        ([UINT4], {"element": "uint4", "is_symmetric": False}),
        (
            {"dtype": "fp8_e4m3", "qscheme": "per_block", "block_size": [128, 64]},
            {"strategy": "block", "block_rows": 128, "group_size": 64},
        ),
    ],
    ids=["e5m2", "mode", "e5m3", "e8m0", "two stages", "mx", "codes of codes", "list of one", "block"],
)
def test_spec_says_what_a_weight_is(weight: Any, expected: dict[str, Any]) -> None:
    found = spec(config(weight)).weight
    assert found is not None
    assert {name: getattr(found, name) for name in expected} == expected


def test_floats_and_null_leave_a_tensor_as_it_is() -> None:
    assert config({"dtype": "bfloat16"}).for_layer("a", "Linear") is None
    assert config(None).for_layer("a", "Linear") is None


@pytest.mark.parametrize(
    ("weight", "fault"),
    [
        ({**FP8, "dtype": "int5"}, "weight.dtype must be one of .*got 'int5'"),
        ({**FP8, "dtype": ["fp8_e4m3"]}, "weight.dtype must be one of"),
        ({**FP8, "qscheme": "per_channel", "ch_axis": 1}, "weight.ch_axis must be 0, for a scale of each row, got 1"),
        ({**FP8, "dtype": "mx9"}, "weight.dtype 'mx9' is only emulated by quark, which exports no codes of it"),
        ({**FP8, "qscheme": "per_row"}, "weight.qscheme must be one of .*got 'per_row'"),
        ({**UINT4, "group_size": 0}, "weight.group_size must be a positive integer, got 0"),
        ({**UINT4, "group_size": None}, "weight.group_size must be a positive integer, got None"),
        ({**FP8, "qscheme": "per_block", "block_size": 128}, "weight.block_size must be two numbers"),
        ({**UINT4, "qscheme": "per_block", "block_size": [8, 8]}, "per_block serves floats"),
        ({**MX, "scale_calculation_mode": "odd"}, "scale_calculation_mode must be one of even, floor, ceil"),
        ({**FP8, "scale_type": "int8"}, "weight.scale_type must be one of"),
        ({**FP8, "observer_cls": "nothing"}, "weight.observer_cls must be the name of an observer.*got 'nothing'"),
        ({**UINT4, "scale_format": "e8m0"}, "scales of uint4 are floats, not e8m0"),
        ({"dtype": "mx", "mx_element_dtype": "int8"}, "mx_element_dtype must be 'fp4' with dtype 'mx', got 'int8'"),
        ([MX, UINT4], r"weight\[1\] must be fp8_e4m3 per_tensor"),
        ([MX, FP8, FP8], "a list holds one spec, or two"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_wrong_spec_is_refused_by_its_key(weight: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=f"QuarkConfig.global_quant_config.*{fault}"):
        config(weight)


def test_what_is_no_spec_is_refused_by_its_key() -> None:
    with pytest.raises(TypeError, match=r"layer_quant_config\['\*proj'\].weight must be a spec"):
        config(layer_quant_config={"*proj": {"weight": "fp8"}})
    for key in ("is_dynamic", "symmetric"):
        with pytest.raises(TypeError, match=rf"global_quant_config\.weight\.{key} must be .*'no'"):
            config({**FP8, key: "no"})
    with pytest.raises(TypeError, match=r"global_quant_config\.weight\.observer_cls must be .*int: 3"):
        config({**FP8, "observer_cls": 3})
    with pytest.raises(ValueError, match=r"global_quant_config\.bias: quantized biases are not read"):
        config(global_quant_config={"weight": FP8, "bias": FP8})


@pytest.mark.parametrize("name", ["pack_method", "weight_format"])
def test_unknown_export_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"QuarkConfig.export.{name} must be one of .*got 'other'"):
        config(export={name: "other"})


@pytest.mark.parametrize("floor", [-0.5, float("nan"), "low"])
def test_wrong_floor_of_scales_is_refused(floor: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"QuarkConfig\.export\.min_kv_scale must"):
        config(export={"min_kv_scale": floor})


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ({**FP8, "dtype": "uint8"}, "activations in uint8"),
        ({**FP8, "qscheme": "per_channel"}, "static activations in e4m3 by channel"),
        ({**FP8, "qscheme": "per_block", "block_size": [2, 64], "is_dynamic": True}, "blocks of 2 rows"),
    ],
    ids=["uint8", "static channel", "block"],
)
def test_activation_that_is_not_run_is_refused(spec: dict[str, Any], fault: str) -> None:
    parsed = TensorQuant.parse(spec, "input_tensors")
    assert parsed is not None
    with pytest.raises(ValueError, match=fault):
        parsed.activation()


def test_scale_type_says_the_dtype_of_stored_scales() -> None:
    layer = LayerSpec.parse({"weight": {**FP8, "scale_type": "float32"}, "input_tensors": FP8}, "layer")
    found = format_of(layer, config(), "bfloat16")
    assert isinstance(found, QuarkWeight)
    assert (found.scale_dtype, found.input_dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"export": {"weight_format": "fake_quantized"}}, "fake_quantized"),
        ({"weight": {**FP8, "scale_type": "pof2"}}, "pof2"),
        ({"weight": {"dtype": "mx"}}, "mx"),
    ],
    ids=["floats", "powers of two", "interleaved"],
)
def test_what_is_only_read_is_not_made(fields: dict[str, Any], fault: str) -> None:
    found = config(**fields)
    QuarkQuantizer(found)
    with pytest.raises(ValueError, match=f"'{fault}' is read, not made"):
        QuarkQuantizer(found, pre_quantized=False)


def test_weight_that_no_tool_reads_is_not_made() -> None:
    with pytest.raises(ValueError, match="quark has no export of int3 by group"):
        QuarkQuantizer(config({**UINT4, "dtype": "int3"}), pre_quantized=False)


def test_rotation_that_runs_with_the_model_is_refused() -> None:
    found = config(algo_config=[{"name": "awq"}, {"name": "rotation", "r1": True, "r4": True}])
    with pytest.raises(ValueError, match=r"rotations run with the model \(r4\)"):
        QuarkQuantizer(found)
    QuarkQuantizer(config(algo_config=[{"name": "rotation", "r1": True, "r2": True, "r4": False}]))


def test_algorithm_is_not_passed_over_in_silence() -> None:
    found = config(algo_config=[{"name": "awq"}])
    QuarkQuantizer(found)
    with pytest.raises(ValueError, match="algo_config names algorithms"):
        QuarkQuantizer(found, pre_quantized=False)
