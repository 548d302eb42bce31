"""Configs that can only be mistakes: refused by name, or told; stored files with odd but harmless keys still load."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantcore
from quantcore.cli.config_flags import config_fields
from quantcore.nn import QuantizedLinear
from quantcore.plugins.manager import plugins
from quantcore.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

INT4 = {"num_bits": 4, "group_size": 32, "strategy": "group"}
QUARK_INT4 = {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "ch_axis": 1, "symmetric": True}
QUARK_MX = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0"}
BASES: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True},
    "gptq": {"bits": 4, "group_size": 32},
    "awq": {"bits": 4, "group_size": 32},
    "auto-round": {"bits": 4, "group_size": 32},
    "fp8": {"weight_block_size": [32, 32]},
    "mxfp8": {},
    "fbgemm_fp8": {},
    "hqq": {"nbits": 4, "group_size": 64},
    "compressed-tensors": {"config_groups": {"g": {"targets": ["Linear"], "weights": INT4}}},
    "quark": {"global_quant_config": {"weight": QUARK_INT4}},
}


def config_of(method: str, **changes: Any) -> dict[str, Any]:
    return {"quant_method": method, **copy.deepcopy(BASES[method]), **changes}


def quark(**changes: Any) -> dict[str, Any]:
    return config_of("quark", global_quant_config={"weight": {**QUARK_INT4, **changes}})


def compressed(**changes: Any) -> dict[str, Any]:
    return config_of("compressed-tensors", config_groups={"g": {"targets": ["Linear"], "weights": {**INT4, **changes}}})


def hqq(part: str = "weight_quant_params", **changes: Any) -> dict[str, Any]:
    weight = {"nbits": 4, "group_size": 64, "axis": 1}
    parts = {"weight_quant_params": weight, part: {**weight, **changes}}
    return {"quant_method": "hqq", "quant_config": parts}


# Keys that nobody knows

MISSPELT: dict[str, tuple[dict[str, Any], str]] = {
    "bnb": (
        config_of("bitsandbytes", bnb_4bit_quant_typ="nf4"),
        r"typ \(did you mean 'bnb_4bit_quant_type'",
    ),
    "gptq": (config_of("gptq", groupsize=64), r"groupsize \(did you mean 'group_size'"),
    "gptq-dynamic": (config_of("gptq", dynamic={"a.*": {"bit": 8}}), r"dynamic\['a\.\*'\]\.bit \(did you mean 'bits'"),
    "awq": (config_of("awq", zero_points=False), r"zero_points \(did you mean 'zero_point'"),
    "auto-round": (config_of("auto-round", itres=10), r"itres \(did you mean 'iters'"),
    "auto-round-extra": (
        config_of("auto-round", extra_config={"a": {"bitss": 8}}),
        r"extra_config\['a'\]\.bitss \(did you mean 'bits'",
    ),
    "fp8": (config_of("fp8", weight_blocksize=[1, 32]), r"weight_blocksize \(did you mean 'weight_block_size'"),
    "mxfp8": (config_of("mxfp8", module_to_not_convert=["a"]), r"module_to_not_convert \(did you mean 'modules_to_not"),
    "fbgemm": (config_of("fbgemm_fp8", activation_scale=3.0), r"activation_scale \(did you mean 'activation_scale_ub'"),
    "hqq": (config_of("hqq", group_siz=32), r"group_siz \(did you mean 'group_size'"),
    "hqq as gptq": (config_of("hqq", bits=4), r"bits \(did you mean 'nbits'"),
    "compressed-scheme": (config_of("compressed-tensors", schem="W4A16"), r"schem \(did you mean 'scheme'"),
    "hqq-nested": (hqq(group_sise=32), r"quant_config\.weight_quant_params\.group_sise \(did you mean 'group_size'"),
    "quark": (config_of("quark", excluded=["a"]), r"excluded \(did you mean 'exclude'"),
    "quark-nested": (quark(simmetric=False), r"global_quant_config\.weight\.simmetric \(did you mean 'symmetric'"),
    "compressed": (config_of("compressed-tensors", ignored=["a"]), r"ignored \(did you mean 'ignore'"),
    "far from any": (config_of("gptq", zzzzzzz=1), r"no zzzzzzz; correct it, or leave it out; it takes bits, "),
}


@pytest.mark.parametrize(("config", "expected"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_key_is_refused_where_a_float_model_is_to_be_quantized(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        AutoHfQuantizer.from_config(config, pre_quantized=False)


@pytest.mark.parametrize(("config", "expected"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_key_of_a_stored_model_is_told(
    config: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        AutoHfQuantizer.from_config(config, pre_quantized=True)
    assert re.search(expected.partition(";")[0], caplog.text)


@pytest.mark.parametrize("method", sorted(info.method for info in quantcore.methods() if info.installed))
def test_each_argument_is_meant_by_its_name_without_the_last_letter(method: str) -> None:
    backend = plugins().backend(method)
    config = backend.default or backend.example_configs[0]
    names = [field.name for field in config_fields(plugins().resolve(method, "config"))]
    for short in {name[:-1] for name in names if len(name) > 1} - {*config, *names}:
        described = {"quant_method": method, **config, short: 1}
        with pytest.raises(ValueError, match=rf"no {short} \(did you mean '{short}.'"):
            AutoQuantizationConfig.from_dict(described).check_quantizes()


@pytest.mark.parametrize("method", BASES)
def test_plain_config_of_each_method_quantizes_without_a_word(method: str, caplog: pytest.LogCaptureFixture) -> None:
    AutoQuantizationConfig.from_dict(config_of(method)).check_quantizes()
    assert not caplog.messages


def test_keys_of_published_files_are_known(golden_config: Path) -> None:
    case = json.loads(golden_config.read_text())
    if any(info.installed and info.method == case["expect"]["method"] for info in quantcore.methods()):
        assert AutoQuantizationConfig.from_dict(case["config"]).unknown_keys() == []


def test_keys_of_published_checkpoints_are_known(installed_checkpoint: Path) -> None:
    found = json.loads((installed_checkpoint / "config.json").read_text())["quantization_config"]
    assert AutoQuantizationConfig.from_dict(found).unknown_keys() == []


# Nothing asked for


@pytest.mark.parametrize(
    "flags", [{"load_in_4bit": False}, {"load_in_8bit": False}, {"load_in_4bit": False, "load_in_8bit": False}], ids=str
)
def test_no_width_cannot_quantize(flags: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match="load_in_4bit and load_in_8bit are both false; set one"):
        quantcore.quantize(model, {"quant_method": "bitsandbytes", **flags})
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="are both false"):
        QuantizedLinear.from_linear(model[0], {"quant_method": "bitsandbytes", **flags})


def test_config_object_without_a_width_cannot_quantize() -> None:
    from quantcore_bnb.bitsandbytes.config import BitsAndBytesConfig

    with pytest.raises(ValueError, match="are both false"):
        quantcore.quantize(nn.Sequential(nn.Linear(64, 64)), BitsAndBytesConfig())


# Two names of one setting

CONFLICTS: dict[str, dict[str, Any]] = {
    "gptq-bits": config_of("gptq", w_bit=8),
    "gptq-wbits": config_of("gptq", wbits=8),
    "gptq-group": config_of("gptq", q_group_size=64),
    "gptq-format": config_of("gptq", format="marlin", checkpoint_format="gptq"),
    "awq-bits": config_of("awq", w_bit=8),
    "awq-group": config_of("awq", q_group_size=64),
    "awq-checkpoint-format": config_of("awq", format="gemv", checkpoint_format="gemm"),
    "auto-round-bits": config_of("auto-round", w_bit=8),
}


@pytest.mark.parametrize("config", CONFLICTS.values(), ids=CONFLICTS)
def test_two_names_of_one_setting_that_differ_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are names of one setting; leave one out"):
        AutoQuantizationConfig.from_dict(config)


@pytest.mark.parametrize(
    "config",
    [
        config_of("gptq", w_bit=4, q_group_size=32, format="gptq_v2", checkpoint_format="gptq_v2"),
        config_of("gptq", w_bit=None),
        config_of("awq", w_bit=4, version="GEMM", format="gemm"),
    ],
    ids=["gptq", "null", "awq"],
)
def test_two_names_that_agree_are_one(config: dict[str, Any]) -> None:
    found: Any = AutoQuantizationConfig.from_dict(config)
    assert (found.bits, found.group_size) == (4, 32)


def test_two_names_of_the_layout_in_python_are_refused() -> None:
    from quantcore_gptq.gptq.config import GPTQConfig

    with pytest.raises(ValueError, match="are names of one setting"):
        GPTQConfig(bits=4, format="marlin", checkpoint_format="gptq_v2")


# Values that cannot be

VALUES: dict[str, dict[str, Any]] = {
    **{f"{method}-group-{size}": config_of(method, group_size=size) for method in ("gptq", "awq", "auto-round")
       for size in (3, 127, 0, -2, 10**12, "128", 1.5, True)},
    "gptq-dynamic-group": config_of("gptq", dynamic={"a": {"group_size": 127}}),
    "gptq-dynamic-type": config_of("gptq", dynamic={"a": 3}),
    "gptq-backend": config_of("gptq", backend="exlama"),
    "gptq-format": config_of("gptq", format="gguf"),
    "gptq-batch": config_of("gptq", batch_size=10**12),
    "gptq-length": config_of("gptq", max_input_length=-5),
    "gptq-damp": config_of("gptq", damp_percent=-0.1),
    "gptq-mse": config_of("gptq", mse=1e30),
    "gptq-seqlen": config_of("gptq", model_seqlen=10**30),
    "awq-backend": config_of("awq", backend="exlama"),
    "awq-version": config_of("awq", version="gem"),
    "awq-zero": config_of("awq", zero_point="yes"),
    "auto-round-backend": config_of("auto-round", backend="exlama"),
    "auto-round-iters": config_of("auto-round", iters=10**9),
    "auto-round-lr": config_of("auto-round", lr=1e9),
    "auto-round-extra": config_of("auto-round", extra_config={"a": {"sym": "no"}}),
    "auto-round-extra-group": config_of("auto-round", extra_config={"a": {"group_size": 127}}),
    "fp8-fmt": config_of("fp8", fmt="e5m2"),
    "fp8-fmt-type": config_of("fp8", fmt=3),
    "fp8-scale-fmt": config_of("fp8", scale_fmt="ue4m3"),
    "fp8-block": config_of("fp8", weight_block_size=[10**12, 1]),
    "fp8-block-negative": config_of("fp8", weight_block_size=[-1, 32]),
    "fp8-ignored": config_of("fp8", ignored_layers="lm_head"),
    "fp8-export": config_of("fp8", export=[1]),
    "mxfp8-fmt": config_of("mxfp8", fmt="e5m2"),
    "fbgemm-bound": config_of("fbgemm_fp8", activation_scale_ub=-1.0),
    "fbgemm-skips": config_of("fbgemm_fp8", modules_to_not_convert={"a": 1}),
    "hqq-group": config_of("hqq", group_size=127),
    "hqq-scale-part": hqq("scale_quant_params", nbits="8"),
    "hqq-scale-part-type": {**hqq(), "quant_config": {**hqq()["quant_config"], "zero_quant_params": 8}},
    "hqq-offload": {**hqq(), "quant_config": {**hqq()["quant_config"], "offload_meta": "no"}},
    "quark-round": quark(round_method="nearest"),
    "quark-scale-format": config_of("quark", global_quant_config={"weight": {**QUARK_MX, "scale_format": "e9m0"}}),
    "quark-group": quark(group_size=10**12),
    "quark-axis": quark(ch_axis=7),
    "quark-axis-type": quark(ch_axis="1"),
    "quark-dynamic": quark(is_dynamic="no"),
    "compressed-group": compressed(group_size=-3),
    "compressed-bits": compressed(num_bits=10**30),
    "compressed-observer": compressed(observer_kwargs=[1]),
    "bnb-threshold": config_of("bitsandbytes", llm_int8_threshold=float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("config", VALUES.values(), ids=VALUES)
def test_value_that_cannot_be_is_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(Config|quant_config)\S* (must|has|is)"):
        AutoQuantizationConfig.from_dict(config)


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round"])
@pytest.mark.parametrize("size", [-1, 8, 16, 24, 128, 1024])
def test_usual_group_sizes_are_taken(method: str, size: int) -> None:
    assert AutoQuantizationConfig.from_dict(config_of(method, group_size=size)).group_size == size  # type: ignore[attr-defined]


def test_odd_groups_do_not_quantize_under_compressed_tensors_silently() -> None:
    layer = nn.Linear(96, 64)
    with torch.no_grad():
        layer.weight.normal_()
    with pytest.raises(ValueError, match="127"):
        QuantizedLinear.from_linear(layer, compressed(group_size=127))
