"""The quantizer interface: every hook of transformers, new and old, with the behaviour of its base class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_int8 import TinyInt8Config, TinyInt8Quantizer
from torch import nn

import quantcore
from quantcore import HfQuantizer
from quantcore.errors import MissingExtraError
from quantcore.quantizers.hook_rules import RENAMED, UNCALLED, UncalledHookError

# Hooks of transformers 5.23, then those of 4.38 to 5.20 that are gone there.
CURRENT = [
    "validate_environment",
    "update_device_map",
    "update_attn_implementation",
    "update_dtype",
    "preprocess_model",
    "_process_model_before_weight_loading",
    "update_parallel_plan",
    "update_weight_conversions",
    "get_weight_conversions",
    "get_load_operations",
    "get_quantize_ops",
    "adjust_max_memory",
    "param_element_size",
    "param_needs_quantization",
    "get_new_dtype",
    "postprocess_model",
    "_process_model_after_weight_loading",
    "get_state_dict_and_metadata",
    "is_serializable",
    "dequantize",
    "_dequantize",
    "remove_quantization_config",
    "get_modules_to_not_convert",
    "_convert_model_for_quantization",
]
OLD = [
    "update_torch_dtype",
    "adjust_target_dtype",
    "get_special_dtypes_update",
    "update_missing_keys",
    "update_missing_keys_after_loading",
    "update_expected_keys",
    "update_unexpected_keys",
    "check_quantized_param",
    "create_quantized_param",
    "get_param_name",
    "update_param_name",
    "get_cuda_warm_up_factor",
    "get_accelerator_warm_up_factor",
    "update_tp_plan",
    "update_ep_plan",
    "update_state_dict_with_metadata",
]
PROPERTIES = ["quantized_element_size", "is_trainable", "is_qat_trainable", "is_compileable"]


def quantizer(**options: Any) -> HfQuantizer:
    return HfQuantizer(TinyInt8Config(), **options)


class Config:
    """A model config that writes itself as transformers' do."""

    def to_json_string(self) -> str:
        return "{}"


@pytest.fixture
def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2))
    made.config = Config()  # type: ignore[assignment]
    return made


# Names


@pytest.mark.parametrize("name", CURRENT + OLD)
def test_hook_is_a_method(name: str) -> None:
    assert inspect.isroutine(getattr(HfQuantizer, name))


@pytest.mark.parametrize("name", PROPERTIES)
def test_hook_is_a_property(name: str) -> None:
    assert isinstance(inspect.getattr_static(HfQuantizer, name), property)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requires_calibration", False),
        ("serialized_names", {}),
        ("required_packages", None),
        ("requires_parameters_quantization", False),
    ],
)
def test_class_attribute_has_its_default(name: str, value: Any) -> None:
    assert getattr(HfQuantizer, name) == value


# Construction


def test_quantizer_is_pre_quantized_unless_told() -> None:
    assert quantizer().pre_quantized is True
    assert quantizer(pre_quantized=False).pre_quantized is False


def test_quantizer_holds_its_config() -> None:
    config = TinyInt8Config()
    assert HfQuantizer(config).quantization_config is config


def test_unknown_keywords_of_the_constructor_are_taken() -> None:
    assert quantizer(device_map="auto", keep_in_fp32_modules=[]).pre_quantized is True


class Calibrated(HfQuantizer):
    requires_calibration = True


def test_calibrated_method_cannot_quantize_without_data() -> None:
    with pytest.raises(ValueError, match="tiny-int8 quantizes with calibration data"):
        Calibrated(TinyInt8Config(), pre_quantized=False)


def test_calibrated_method_loads_a_quantized_checkpoint() -> None:
    assert Calibrated(TinyInt8Config()).pre_quantized is True


# What hands its argument back

MARK = object()
IDENTITIES: dict[str, Callable[[HfQuantizer], Any]] = {
    "update_device_map": lambda q: q.update_device_map(MARK),
    "update_attn_implementation": lambda q: q.update_attn_implementation(MARK),
    "update_dtype": lambda q: q.update_dtype(MARK),  # type: ignore[arg-type]
    "adjust_max_memory": lambda q: q.adjust_max_memory(MARK),  # type: ignore[arg-type]
    "update_torch_dtype": lambda q: q.update_torch_dtype(MARK),  # type: ignore[arg-type]
    "adjust_target_dtype": lambda q: q.adjust_target_dtype(MARK),  # type: ignore[arg-type]
    "update_missing_keys": lambda q: q.update_missing_keys(None, MARK, ""),  # type: ignore[arg-type]
    "update_missing_keys_after_loading": lambda q: q.update_missing_keys_after_loading(None, MARK, ""),  # type: ignore[arg-type]
    "update_expected_keys": lambda q: q.update_expected_keys(None, MARK, []),  # type: ignore[arg-type]
    "update_unexpected_keys": lambda q: q.update_unexpected_keys(None, MARK),  # type: ignore[arg-type]
    "update_unexpected_keys with prefix": lambda q: q.update_unexpected_keys(None, MARK, ""),  # type: ignore[arg-type]
    "get_param_name": lambda q: q.get_param_name(MARK),  # type: ignore[arg-type]
    "update_param_name": lambda q: q.update_param_name(MARK),  # type: ignore[arg-type]
    "update_tp_plan": lambda q: q.update_tp_plan(MARK),
    "update_ep_plan": lambda q: q.update_ep_plan(MARK),
    "update_state_dict_with_metadata": lambda q: q.update_state_dict_with_metadata(MARK, {}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", IDENTITIES.values(), ids=IDENTITIES)
def test_hook_hands_its_argument_back(call: Callable[[HfQuantizer], Any]) -> None:
    assert call(quantizer()) is MARK


VALUES: dict[str, tuple[Callable[[HfQuantizer], Any], Any]] = {
    "validate_environment": (lambda q: q.validate_environment(device_map="auto", weights_only=True), None),
    "validate_environment of 4.x": (lambda q: q.validate_environment(dtype=None, from_tf=False, from_flax=False), None),
    "quantized_element_size": (lambda q: q.quantized_element_size, None),
    "param_needs_quantization": (lambda q: q.param_needs_quantization(None, "a.weight"), False),
    "param_element_size": (lambda q: q.param_element_size(None, "a", torch.zeros(1, dtype=torch.bfloat16)), 2.0),
    "get_load_operations": (lambda q: q.get_load_operations(), {}),
    "get_weight_conversions": (lambda q: q.get_weight_conversions(), []),
    "update_weight_conversions": (lambda q: q.update_weight_conversions(["given"], None), ["given"]),
    "update_weight_conversions of 5.12": (lambda q: q.update_weight_conversions(["given"]), ["given"]),
    "get_state_dict_and_metadata": (lambda q: q.get_state_dict_and_metadata(None), (None, {})),
    "get_state_dict_and_metadata of 4.57": (lambda q: q.get_state_dict_and_metadata(None, True), (None, {})),
    "is_serializable": (lambda q: q.is_serializable(), False),
    "is_serializable of 4.57": (lambda q: q.is_serializable(safe_serialization=True), False),
    "is_trainable": (lambda q: q.is_trainable, False),
    "is_qat_trainable": (lambda q: q.is_qat_trainable, False),
    "is_compileable": (lambda q: q.is_compileable, False),
    "get_special_dtypes_update": (lambda q: q.get_special_dtypes_update(None, torch.float16), {}),
    "check_quantized_param": (lambda q: q.check_quantized_param(None, None, "a.weight", {}, param_device="cpu"), False),
    "get_cuda_warm_up_factor": (lambda q: q.get_cuda_warm_up_factor(), 4),
    "get_accelerator_warm_up_factor": (lambda q: q.get_accelerator_warm_up_factor(), 4),
}


@pytest.mark.parametrize(("call", "value"), VALUES.values(), ids=VALUES)
def test_hook_has_its_base_behaviour(call: Callable[[HfQuantizer], Any], value: Any) -> None:
    assert call(quantizer()) == value


@pytest.mark.parametrize(
    "call",
    [
        lambda q: q.get_quantize_ops(),
        lambda q: q.create_quantized_param(None, None, "a.weight", "cpu"),
        lambda q: q.dequantize(nn.Identity()),
    ],
    ids=["get_quantize_ops", "create_quantized_param", "dequantize"],
)
def test_what_only_a_subclass_can_do_names_the_method(call: Callable[[HfQuantizer], Any]) -> None:
    with pytest.raises(NotImplementedError, match="tiny-int8"):
        call(quantizer())


@pytest.mark.parametrize("name", UNCALLED)
def test_override_that_nothing_calls_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(UncalledHookError, match=f"Stranger overrides .*\\n{name}: ") as caught:
        type("Stranger", (HfQuantizer,), {name: lambda self, *args: None})
    assert UNCALLED[name] in str(caught.value)


def test_override_by_a_class_that_is_mixed_in_is_refused() -> None:
    class Stranger:
        def get_quantize_ops(self) -> Any:
            return None

    with pytest.raises(UncalledHookError, match="Mixed overrides"):
        type("Mixed", (Stranger, HfQuantizer), {})


def test_every_other_hook_is_called_by_the_core() -> None:
    """By loading, saving, the adapter of transformers, or another hook: each call is a line of the sources."""
    sources = "\n".join(path.read_text() for path in Path(quantcore.__file__).parent.rglob("*.py"))
    hooks = {name for name in vars(HfQuantizer) if not name.startswith("__")} - {*UNCALLED, *RENAMED, "_method"}
    assert [name for name in hooks if not re.search(rf"\.{name}\b", sources)] == []


def test_hook_under_its_old_name_serves() -> None:
    class Older(HfQuantizer):
        def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
            return torch.float16

    assert Older(TinyInt8Config()).update_dtype(torch.float32) == torch.float16


def test_package_that_a_method_requires_and_lacks_is_named() -> None:
    class Needy(HfQuantizer):
        required_packages: ClassVar[list[str]] = ["json", "no_such_package"]

    with pytest.raises(MissingExtraError, match="tiny-int8 needs no_such_package"):
        Needy(TinyInt8Config()).validate_environment()


@pytest.mark.parametrize(
    ("converter", "param", "dtype"),
    [
        (None, torch.zeros(1), torch.float16),
        (None, torch.zeros(1, dtype=torch.int8), None),
        (SimpleNamespace(operations=[SimpleNamespace(hf_quantizer=None)]), torch.zeros(1), torch.float16),
        (SimpleNamespace(operations=[SimpleNamespace(hf_quantizer="q")]), torch.zeros(1), None),
    ],
    ids=["float", "integer", "renaming", "op-of-a-quantizer"],
)
def test_checkpoint_tensor_is_cast_unless_it_is_ours(
    converter: Any, param: torch.Tensor, dtype: torch.dtype | None
) -> None:
    assert quantizer().get_new_dtype(converter, param, torch.float16) == dtype


# Around the load


class Traced(HfQuantizer):
    """Writes down which of its inner hooks are called, with what."""

    serialized_names: ClassVar[dict[str, list[str]]] = {"weight": ["weight", "weight_scale"]}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        self.calls.append(("convert", {}))

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.calls.append(("before", kwargs))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.calls.append(("after", kwargs))


def test_preprocess_marks_the_model(model: nn.Module) -> None:
    assert quantizer().preprocess_model(model) is model
    assert (model.is_quantized, model.quantization_method) == (True, "tiny-int8")


def test_preprocess_calls_the_inner_hooks_in_order(model: nn.Module) -> None:
    traced = Traced(TinyInt8Config())
    traced.preprocess_model(model, dtype=torch.float16, device_map="cpu", use_kernels=False)
    assert traced.calls == [("convert", {}), ("before", {"device_map": "cpu", "use_kernels": False})]


def test_preprocess_of_a_float_model_swaps_no_fused_module(model: nn.Module) -> None:
    traced = Traced(TinyInt8Config(), pre_quantized=False)
    traced.preprocess_model(model)
    assert [name for name, _ in traced.calls] == ["before"]


@pytest.mark.parametrize("attribute", ["tp_plan", "ep_plan"])
def test_preprocess_gives_companions_the_plan_of_their_weight(model: nn.Module, attribute: str) -> None:
    setattr(model, attribute, {"layers.*.q_proj.weight": "colwise", "norm.bias": "replicate"})
    Traced(TinyInt8Config()).preprocess_model(model)
    assert getattr(model, attribute) == {
        "layers.*.q_proj.weight": "colwise",
        "layers.*.q_proj.weight_scale": "colwise",
        "norm.bias": "replicate",
    }


def test_plan_that_names_a_companion_is_kept() -> None:
    plan = {"q.weight": "colwise", "q.weight_scale": "replicate"}
    assert Traced(TinyInt8Config()).update_parallel_plan(nn.Identity(), dict(plan)) == plan


def test_postprocess_leaves_quantizer_and_config_on_the_model(model: nn.Module) -> None:
    traced = Traced(TinyInt8Config())
    assert traced.postprocess_model(model) is model
    assert model.hf_quantizer is traced
    assert model.config.quantization_config is traced.quantization_config
    assert model.config._is_quantized is True
    assert traced.calls == [("after", {})]


@pytest.mark.parametrize(
    "config", [None, {"width": 2}, 3, SimpleNamespace(width=2)], ids=["none", "dict", "int", "object"]
)
def test_config_of_another_kind_is_left_alone(config: Any) -> None:
    model = nn.Linear(1, 1)
    model.config = config
    before = repr(config)
    traced = Traced(TinyInt8Config())
    traced.remove_quantization_config(traced.postprocess_model(model))
    assert repr(model.config) == before


def test_model_dequantized_while_loading_bears_no_trace(model: nn.Module) -> None:
    config = TinyInt8Config()
    config.dequantize = True  # type: ignore[attr-defined]
    loader = Traced(config)
    loader.postprocess_model(loader.preprocess_model(model))
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert model.is_quantized is False


def test_removal_deletes_every_trace(model: nn.Module) -> None:
    made = quantizer()
    made.remove_quantization_config(made.postprocess_model(made.preprocess_model(model)))
    assert model.is_quantized is False
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert vars(model.config) == {}


def test_dequantize_hands_the_dtype_on_and_removes_the_traces(model: nn.Module) -> None:
    class Plain(HfQuantizer):
        def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
            model.asked = dtype  # type: ignore[assignment]
            return model

    made = Plain(TinyInt8Config())
    made.postprocess_model(made.preprocess_model(model))
    assert made.dequantize(model, torch.float16).asked == torch.float16
    assert model.is_quantized is False


# Which modules stay float


class Tied(nn.Module):
    """A language model's bones: tied embedding and head, and a last parameter that is a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.last = nn.Linear(2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_automatic_list_holds_head_tied_ends_and_last_parameter() -> None:
    assert set(HfQuantizer.get_modules_to_not_convert(Tied())) == {"head", "embed", "last.bias"}


def test_given_list_replaces_the_automatic_one() -> None:
    assert HfQuantizer.get_modules_to_not_convert(Tied(), ["body"]) == ["body"]


def test_empty_list_is_a_list() -> None:
    assert HfQuantizer.get_modules_to_not_convert(Tied(), []) == []


def test_given_list_may_be_added_to_the_automatic_one() -> None:
    found = HfQuantizer.get_modules_to_not_convert(Tied(), ["body"], add_default_skips=True)
    assert set(found) == {"head", "embed", "last.bias", "body"}


def test_modules_kept_in_float32_are_always_added() -> None:
    assert HfQuantizer.get_modules_to_not_convert(Tied(), ["body"], ["norm"]) == ["body", "norm"]


# The generic quantizer


def test_weight_quantizer_saves_trains_and_compiles() -> None:
    made = TinyInt8Quantizer(TinyInt8Config())
    assert (made.is_serializable(), made.is_trainable, made.is_compileable) == (True, True, True)
