"""The base of every config, the checks that fields share, and the way from a dict to the right class."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8Config

import quantcore
from quantcore.errors import BackendNotInstalledError, UnknownMethodError
from quantcore.plugins.known import KNOWN_METHODS, normalize_method
from quantcore.quantization_config import (
    QuantizationConfigMixin,
    QuantizationMethod,
    as_dtype,
    diff_from_default,
    matches_type,
    option,
)
from quantcore.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

# The enum of transformers 5.23: 26 methods by the name of their member.
PUBLISHED = {
    "BITS_AND_BYTES": "bitsandbytes",
    "GPTQ": "gptq",
    "AWQ": "awq",
    "AQLM": "aqlm",
    "VPTQ": "vptq",
    "QUANTO": "quanto",
    "EETQ": "eetq",
    "HIGGS": "higgs",
    "HQQ": "hqq",
    "COMPRESSED_TENSORS": "compressed-tensors",
    "FBGEMM_FP8": "fbgemm_fp8",
    "TORCHAO": "torchao",
    "BITNET": "bitnet",
    "SPQR": "spqr",
    "FP8": "fp8",
    "QUARK": "quark",
    "FPQUANT": "fp_quant",
    "AUTOROUND": "auto-round",
    "MXFP4": "mxfp4",
}
OTHERS = {"modelopt"}  # of NVIDIA's Model Optimizer: transformers reads none of it
NEWER = {"gguf", "nvfp4", "mxfp8", "metal", "fouroversix", "sinq", "gemma"}


@pytest.fixture(autouse=True)
def _tiny(tiny: None) -> None:
    """The method tiny-int8 is there in every test of this file."""


def load(**fields: Any) -> TinyInt8Config:
    config = TinyInt8Config.from_dict(fields)
    assert isinstance(config, TinyInt8Config)
    return config


# The enum


@pytest.mark.parametrize(("member", "value"), PUBLISHED.items(), ids=PUBLISHED)
def test_published_member_has_its_value(member: str, value: str) -> None:
    assert QuantizationMethod[member].value == value


def test_enum_holds_the_newer_methods() -> None:
    assert {member.value for member in QuantizationMethod} == {*PUBLISHED.values(), *NEWER}


def test_member_equals_its_string() -> None:
    assert QuantizationMethod.GPTQ == "gptq"
    assert json.dumps(QuantizationMethod.GPTQ) == '"gptq"'


def test_every_member_is_a_known_method_with_an_extra() -> None:
    assert {member.value for member in QuantizationMethod} | OTHERS == set(KNOWN_METHODS)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("gptq", "gptq"),
        ("GPTQ", "gptq"),
        (" hqq ", "hqq"),
        (QuantizationMethod.AWQ, "awq"),
        ("intel/auto-round", "auto-round"),
        ("compressed_tensors", "compressed-tensors"),
        ("bitsandbytes_4bit", "bitsandbytes"),
        ("bitsandbytes_8bit", "bitsandbytes"),
        ("MyOwn", "MyOwn"),
        ("", ""),
    ],
)
def test_method_spelling_is_normalised(spelling: str, name: str) -> None:
    assert normalize_method(spelling) == name


@pytest.mark.parametrize("method", [4, None, ["gptq"], {"name": "gptq"}, b"gptq", True], ids=repr)
def test_method_that_is_no_string_is_a_type_error(method: object) -> None:
    with pytest.raises(TypeError, match="quant_method must be a string"):
        normalize_method(method)


# Reading


def test_from_dict_gives_the_fields() -> None:
    config = load(threshold=1.5, sizes=[3])
    assert (config.threshold, config.sizes, config.bits) == (1.5, [3], 8)


def test_from_dict_leaves_the_dict_alone() -> None:
    given = {"quant_method": "tiny-int8", "sizes": [3], "extra": {"a": [1]}}
    before = copy.deepcopy(given)
    config = load(**given)
    config.sizes.append(4)
    config.extra_keys["extra"]["a"].append(2)
    assert given == before


def test_from_dict_sets_keywords_on_top() -> None:
    assert TinyInt8Config.from_dict({"threshold": 1.0}, threshold=2.0).threshold == 2.0  # type: ignore[union-attr]


def test_from_dict_returns_unused_keywords_when_asked() -> None:
    config, unused = TinyInt8Config.from_dict({}, return_unused_kwargs=True, threshold=2.0, device="cpu")
    assert (config.threshold, unused) == (2.0, {"device": "cpu"})


def test_from_dict_drops_unused_keywords_otherwise() -> None:
    assert "device" not in TinyInt8Config.from_dict({}, device="cpu").to_dict()  # type: ignore[union-attr]


def test_from_dict_checks_keywords() -> None:
    with pytest.raises(ValueError, match=r"TinyInt8Config.threshold must lie in \[0.0, 100.0\]"):
        TinyInt8Config.from_dict({}, threshold=-1.0)


@pytest.mark.parametrize("value", [None, 3, "bits", [("bits", 8)], {"bits"}], ids=repr)
def test_from_dict_of_something_else_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="TinyInt8Config: expected a dict"):
        TinyInt8Config.from_dict(value)


def test_missing_required_field_is_named() -> None:
    @dataclass(eq=False, repr=False)
    class NeedsBits(QuantizationConfigMixin):
        quant_method = "needs-bits"
        bits: int = option(choices=(4, 8))

    with pytest.raises(ValueError, match="NeedsBits: missing bits"):
        NeedsBits.from_dict({})


def test_defaults_are_not_shared() -> None:
    TinyInt8Config().sizes.append(9)
    assert TinyInt8Config().sizes == [1, 2]


# Writing


def test_round_trip_gives_an_equal_config() -> None:
    config = load(threshold=2.0, compute_dtype="bfloat16", unknown={"a": [1, None]})
    assert TinyInt8Config.from_dict(config.to_dict()) == config


def test_to_dict_holds_method_fields_and_unknown_keys() -> None:
    assert load(compute_dtype=torch.float16, zebra=1).to_dict() == {
        "quant_method": "tiny-int8",
        "bits": 8,
        "threshold": 6.0,
        "sizes": [1, 2],
        "compute_dtype": "float16",
        "modules_to_not_convert": None,
        "nested": None,
        "zebra": 1,
    }


def test_to_dict_is_a_deep_copy() -> None:
    config = load(extra=[1])
    config.to_dict()["sizes"].append(5)
    config.to_dict()["extra"].append(5)
    assert (config.sizes, config.extra_keys["extra"]) == ([1, 2], [1])


def test_unknown_keys_with_torch_dtypes_become_json() -> None:
    assert load(torch_dtype=torch.bfloat16).to_dict()["torch_dtype"] == "bfloat16"


def test_enum_method_is_written_as_its_value() -> None:
    @dataclass(eq=False, repr=False)
    class Enumerated(QuantizationConfigMixin):
        quant_method = QuantizationMethod.GPTQ

    assert json.dumps(Enumerated().to_dict()) == '{"quant_method": "gptq"}'


def test_to_diff_dict_is_the_full_dict_by_default() -> None:
    config = load(threshold=1.0)
    assert config.to_diff_dict() == config.to_dict()


def test_diff_from_default_keeps_what_differs() -> None:
    assert diff_from_default(load(threshold=1.0, zebra=2)) == {"threshold": 1.0, "zebra": 2}


def test_json_string_has_sorted_keys_and_a_final_newline() -> None:
    config = load(zebra=1)
    assert config.to_json_string() == json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def test_json_string_uses_the_diff_unless_told_not_to() -> None:
    class Short(TinyInt8Config):
        def to_diff_dict(self) -> dict[str, Any]:
            return {"short": True}

    assert json.loads(Short().to_json_string()) == {"short": True}
    assert json.loads(Short().to_json_string(use_diff=False)) == Short().to_dict()


def test_json_file_holds_the_full_config(tmp_path: Path) -> None:
    config = load(threshold=1.0)
    config.to_json_file(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == config.to_json_string(use_diff=False)


def test_repr_is_the_class_name_and_the_json() -> None:
    config = load(threshold=1.0)
    assert repr(config) == f"TinyInt8Config {config.to_json_string(use_diff=False).strip()}"


def test_iteration_gives_method_fields_and_unknown_keys() -> None:
    config = load(compute_dtype="float16", zebra=1)
    assert dict(config)["compute_dtype"] is torch.float16
    assert list(dict(config)) == list(config.to_dict())


# Changing, comparing, copying


def test_update_returns_what_names_no_field() -> None:
    config = load()
    assert config.update(threshold=3.0, device="cpu") == {"device": "cpu"}
    assert config.threshold == 3.0


def test_update_restores_every_field_on_failure() -> None:
    config = load()
    before = config.to_dict()
    with pytest.raises(ValueError, match="bits must be one of 8"):
        config.update(threshold=3.0, bits=5)
    assert config.to_dict() == before


def test_update_does_not_reach_methods_or_bookkeeping() -> None:
    config = load()
    assert config.update(extra_keys=1, validate=2, quant_method="x") == {
        "extra_keys": 1,
        "validate": 2,
        "quant_method": "x",
    }


@pytest.mark.parametrize(
    "change",
    [{"threshold": 1.0}, {"sizes": [9]}, {"compute_dtype": "float16"}, {"unknown": 1}],
    ids=lambda c: next(iter(c)),
)
def test_configs_that_differ_in_one_field_are_unequal(change: dict[str, Any]) -> None:
    assert load(**change) != load()


def test_configs_of_two_classes_are_unequal() -> None:
    class Other(TinyInt8Config):
        pass

    assert Other() != TinyInt8Config()


def test_config_is_unequal_to_its_dict() -> None:
    assert load() != load().to_dict()


def test_config_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(load())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])  # noqa: S301 - our own bytes
def test_copies_are_equal(copied: Callable[[Any], Any]) -> None:
    config = load(threshold=1.0, compute_dtype="bfloat16", unknown={"a": 1})
    assert copied(config) == config


def test_deep_copy_shares_no_list() -> None:
    config = load()
    copy.deepcopy(config).sizes.append(5)
    assert config.sizes == [1, 2]


# Types and limits

HUGE = 10**400  # no float can hold it


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("bits", "8", TypeError),
        ("bits", 8.0, TypeError),
        ("bits", True, TypeError),
        ("bits", None, TypeError),
        ("bits", [8], TypeError),
        ("bits", -8, ValueError),
        ("bits", 2**62, ValueError),
        ("bits", HUGE, ValueError),
        ("threshold", 6, TypeError),
        ("threshold", False, TypeError),
        ("threshold", "6.0", TypeError),
        ("threshold", float("nan"), ValueError),
        ("threshold", float("inf"), ValueError),
        ("threshold", -0.5, ValueError),
        ("threshold", 1e300, ValueError),
        ("sizes", "12", TypeError),
        ("sizes", (1, 2), TypeError),
        ("sizes", [1, "2"], TypeError),
        ("sizes", [1, True], TypeError),
        ("sizes", [[1]], TypeError),
        ("sizes", [1, 0], ValueError),
        ("sizes", {"a": 1}, TypeError),
        ("compute_dtype", 16, TypeError),
        ("compute_dtype", "bf16", ValueError),
        ("compute_dtype", "nn", ValueError),
        ("compute_dtype", "__class__", ValueError),
        ("compute_dtype", "torch.torch.float16", ValueError),
        ("compute_dtype", "", ValueError),
        ("modules_to_not_convert", "lm_head", TypeError),
        ("modules_to_not_convert", [1], TypeError),
        ("modules_to_not_convert", [None], TypeError),
        ("nested", {"a": {"b": [1, {"c": None}]}}, TypeError),
        ("nested", {1: 1}, TypeError),
        ("nested", [], TypeError),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value!r:.30}",
)
def test_bad_value_is_refused_by_field_name(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"TinyInt8Config\.{field}"):
        load(**{field: value})


def test_huge_integer_within_the_type_is_refused_by_a_limit() -> None:
    @dataclass(eq=False, repr=False)
    class Limited(QuantizationConfigMixin):
        quant_method = "limited"
        group_size: int = option(64, minimum=1, maximum=1 << 24)

    with pytest.raises(ValueError, match=r"Limited.group_size must lie in \[1, 16777216\]"):
        Limited(group_size=HUGE)


def test_error_text_of_a_long_value_is_short() -> None:
    with pytest.raises(TypeError) as caught:
        load(bits="x" * 100_000)
    assert len(str(caught.value)) < 300


def test_bottomless_nesting_is_a_value_error() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=r"TinyInt8Config.junk is nested too deeply"):
        load(junk=deep)


@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=str)
def test_dtype_is_given_by_name_or_as_such(value: Any) -> None:
    assert load(compute_dtype=value).compute_dtype is torch.bfloat16


def test_absent_dtype_stays_none() -> None:
    assert as_dtype(None, "dtype") is None


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (True, bool, True),
        (1, bool, False),
        (1, float, False),
        (1.0, float, True),
        (None, int | None, True),
        ("a", int | None, False),
        ([], list[int], True),
        ([1, 2.0], list[int | float], True),
        ((1, 2), tuple[int, int], True),
        ((1,), tuple[int, int], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": [True]}, dict[str, list[int]], False),
        (Colour.RED, Any, True),
        (Colour.RED, int, False),
    ],
)
def test_value_fits_annotation(value: Any, annotation: Any, fits: bool) -> None:
    assert matches_type(value, annotation) is fits


# From a dict to a class


def test_auto_config_finds_the_class() -> None:
    assert type(AutoQuantizationConfig.from_dict({"quant_method": "tiny-int8"})) is TinyInt8Config


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "quantization_config must be a dict, got NoneType"),
        ("gptq", TypeError, "quantization_config must be a dict, got str"),
        ([{"quant_method": "gptq"}], TypeError, "quantization_config must be a dict, got list"),
        ({}, ValueError, "has no quant_method; add one. Installed methods:"),
        ({"quant_method": None}, ValueError, "has no quant_method"),
        ({"quant_method": ["gptq"]}, TypeError, "quant_method must be a string, got list"),
        ({"quant_method": 4}, TypeError, "quant_method must be a string, got int"),
        ({"quant_method": "gtpq"}, UnknownMethodError, "'gtpq' is unknown; did you mean 'gptq'"),
        ({"quant_method": ""}, UnknownMethodError, "'' is unknown"),
        ({"quant_method": "gptq", "bits": 4}, BackendNotInstalledError, r"pip install \./packages/backend-gptq"),
    ],
    ids=lambda value: f"{value!r:.40}" if not isinstance(value, type) else value.__name__,
)
def test_auto_config_refuses(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AutoQuantizationConfig.from_dict(value)


def test_error_of_an_absurdly_long_method_is_short() -> None:
    with pytest.raises(UnknownMethodError) as caught:
        AutoQuantizationConfig.from_dict({"quant_method": "x" * 100_000})
    assert len(str(caught.value)) < 1500


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_config_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    stored = {"quantization_config": {"quant_method": "tiny-int8", "threshold": 2.0}}
    assert AutoQuantizationConfig.from_pretrained(write_config(tmp_path, stored)).to_dict()["threshold"] == 2.0


def test_config_is_read_from_the_text_part(tmp_path: Path) -> None:
    stored = {"quantization_config": None, "text_config": {"quantization_config": {"quant_method": "tiny-int8"}}}
    assert type(AutoQuantizationConfig.from_pretrained(write_config(tmp_path, stored))) is TinyInt8Config


def test_config_of_a_checkpoint_takes_keywords(tmp_path: Path) -> None:
    stored = {"quantization_config": {"quant_method": "tiny-int8"}}
    config = AutoQuantizationConfig.from_pretrained(write_config(tmp_path, stored), threshold=3.0)
    assert config.to_dict()["threshold"] == 3.0


def test_config_of_a_float_checkpoint_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no quantization_config; this model is not quantized"):
        AutoQuantizationConfig.from_pretrained(write_config(tmp_path, {"quantization_config": None}))


def test_quantizer_of_a_checkpoint_is_pre_quantized(tmp_path: Path) -> None:
    write_config(tmp_path, {"quantization_config": {"quant_method": "tiny-int8"}})
    assert AutoHfQuantizer.from_pretrained(tmp_path).pre_quantized is True


def test_quantizer_of_a_config_is_not_pre_quantized() -> None:
    assert AutoHfQuantizer.from_config({"quant_method": "tiny-int8"}).pre_quantized is False


def test_config_of_another_library_is_taken_by_its_dict() -> None:
    class Foreign:
        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": "tiny-int8", "threshold": 2.0}

    assert AutoHfQuantizer.from_config(Foreign()).quantization_config == load(threshold=2.0)


# Merging and support


class Loading(TinyInt8Config):
    """A config whose threshold may be changed while a checkpoint loads."""

    def get_loading_attributes(self) -> dict[str, Any]:
        return {"threshold": self.threshold}


def test_merge_without_user_config_gives_the_checkpoint_s() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs({"quant_method": "tiny-int8", "threshold": 2.0})
    assert merged == load(threshold=2.0)


def test_merge_takes_only_loading_attributes() -> None:
    merged = AutoHfQuantizer.merge_quantization_configs(Loading(threshold=1.0), Loading(threshold=2.0, sizes=[9]))
    assert merged == Loading(threshold=2.0)


def test_merge_says_what_of_the_user_config_counts(caplog: pytest.LogCaptureFixture) -> None:
    AutoHfQuantizer.merge_quantization_configs(Loading(), Loading(threshold=2.0))
    assert "only ['threshold'] count" in caplog.text


def test_merge_of_two_classes_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="quantized with TinyInt8Config but a Loading was passed"):
        AutoHfQuantizer.merge_quantization_configs(load(), Loading())


def test_supported_method_is_true() -> None:
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "tiny-int8"}) is True


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"quant_method": "gptq"}, BackendNotInstalledError),
        ({"quant_method": "new"}, UnknownMethodError),
        ({}, ValueError),
    ],
    ids=["absent", "unknown", "none"],
)
def test_unsupported_method_raises_instead_of_false(value: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        AutoHfQuantizer.supports_quant_method(value)


# Module paths of transformers


def test_auto_classes_stand_under_the_path_of_transformers() -> None:
    from quantcore.quantizers import auto

    assert auto.AutoHfQuantizer is quantcore.AutoHfQuantizer
    assert auto.register_quantizer is quantcore.register_quantizer


def test_quantizers_package_gives_the_same_names() -> None:
    from quantcore import quantizers

    assert quantizers.AutoQuantizationConfig is quantcore.AutoQuantizationConfig
    assert quantizers.HfQuantizer is quantcore.HfQuantizer


def test_configs_stand_under_the_path_of_transformers() -> None:
    from quantcore.utils import quantization_config

    assert quantization_config.QuantizationMethod is QuantizationMethod
    assert quantization_config.QuantizationConfigMixin is QuantizationConfigMixin


def test_path_of_transformers_gives_the_installed_class() -> None:
    from quantcore.utils import quantization_config

    quantcore.register_quantization_config("hqq")(TinyInt8Config)
    assert quantization_config.HqqConfig is TinyInt8Config


def test_path_of_transformers_names_the_pip_line_of_an_absent_class() -> None:
    from quantcore.utils import quantization_config

    with pytest.raises(ImportError, match=r"pip install \./packages/backend-gptq"):
        quantization_config.GPTQConfig  # noqa: B018 - the access is what is tested


def test_path_of_transformers_has_no_other_names() -> None:
    from quantcore.utils import quantization_config

    with pytest.raises(AttributeError, match="NoSuchConfig"):
        quantization_config.NoSuchConfig  # noqa: B018 - the access is what is tested


def test_every_method_has_a_class_name_of_transformers() -> None:
    from quantcore.utils.quantization_config import CONFIG_CLASSES

    assert set(CONFIG_CLASSES.values()) | {"mxfp8"} | OTHERS == set(KNOWN_METHODS)
