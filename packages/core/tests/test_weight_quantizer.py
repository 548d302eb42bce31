"""The generic quantizer: which layers it takes, what it changes, and what it leaves as it was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8, TinyInt8Config, TinyInt8Quantizer
from torch import nn
from torch.nn.utils import prune

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.selection import default_skips, matches_pattern, tied_modules, tied_names

pytestmark = pytest.mark.usefixtures("tiny")


def quantizer(skip: list[str] | None = None) -> TinyInt8Quantizer:
    return TinyInt8Quantizer(TinyInt8Config(modules_to_not_convert=skip), pre_quantized=False)


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in quantized_modules(model)]


def snapshot(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    return {name: (type(model).__name__, tensor.clone()) for name, tensor in model.state_dict().items()}


# Patterns


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("model.layers.1.mlp", "model.layers.1", True),
        ("model.layers.11.mlp", "model.layers.1", False),
        ("model.layers.1", "model.layers.1", True),
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.lm_head.proj", "lm_head", False),
        ("model.up_gate", "gate", True),
        ("model.gate.up", "gate", False),
        ("mlp.up_proj", "mlp", True),
        ("model.mlp.up_proj", "mlp", False),
        ("model.layers.3.mlp", r"model\.layers\.[0-3]\.", False),
        ("model.layers.3.mlp", r"model\.layers\.[0-3]", True),
        ("model.layers.3.mlp", r".*mlp", True),
        ("a.b", "a|b", True),
        ("ab.c", "a|b", False),
        ("a[0", "a[0", True),
        ("a[0.b", "a[0", True),
        ("b.a", "a[0", False),
        ("", "lm_head", False),
    ],
)
def test_pattern_hits_by_the_rule_of_transformers(name: str, pattern: str, hit: bool) -> None:
    assert matches_pattern(name, pattern) is hit


# Tied weights


def tied_model() -> nn.Module:
    model = nn.Module()
    model.embed = nn.Embedding(4, 2)
    model.body = nn.Linear(2, 2)
    model.head = nn.Linear(2, 4, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_tied_parameter_points_at_the_first_name() -> None:
    assert tied_names(tied_model()) == {"head.weight": "embed.weight"}


def test_both_ends_of_a_tie_are_listed() -> None:
    assert tied_modules(tied_model()) == {"embed": "head", "head": "embed"}


def test_tied_head_stays_float_even_with_an_empty_skip_list() -> None:
    model = tied_model()
    quantizer([]).quantize_model(model)
    assert names(model) == ["body"]
    assert model.head.weight is model.embed.weight  # type: ignore[union-attr]


def test_layer_used_at_two_places_stays_float() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.Linear(2, 2), shared)
    assert dict(quantizer().plan(model).left) == {"0": "its weight is tied to 2"}


def test_module_without_output_embeddings_skips_what_is_called_lm_head() -> None:
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(2, 2))
    model.add_module("last", nn.Linear(2, 2))
    assert default_skips(model) == ["lm_head"]


def test_modules_the_model_keeps_in_float32_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model._keep_in_fp32_modules = ["wo"]  # type: ignore[assignment]
    model._keep_in_fp32_modules_strict = {"norm"}  # type: ignore[assignment]
    assert default_skips(model) == ["wo", "norm"]


def test_weight_that_is_computed_anew_in_each_forward_stays_float() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(3, 4)
    expected = model[0](x)
    quantizer().quantize_model(model)
    assert names(model) == ["1"]
    assert torch.equal(model[0](x), expected)


def test_encoder_layer_of_torch_keeps_what_its_fused_function_multiplies() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 8)).eval()
    quantizer([]).quantize_model(model)
    assert names(model) == ["1"]
    with torch.no_grad():
        assert model(torch.randn(2, 3, 8)).isfinite().all()


# The plan


def test_plan_lists_layers_and_reasons(build_model: Callable[[], nn.Module]) -> None:
    plan = quantizer().plan(build_model())
    assert [layer.name for layer in plan.layers] == ["first", "second"]
    assert dict(plan.left) == {"lm_head": "skipped by 'lm_head'"}


def test_plan_counts_quantized_weights(build_model: Callable[[], nn.Module]) -> None:
    assert quantizer().plan(build_model()).quantized_weights == 2 * 16 * 32


def test_plan_works_on_the_meta_device(build_model: Callable[[], nn.Module]) -> None:
    assert [layer.name for layer in quantizer().plan(build_model().to("meta")).layers] == ["first", "second"]


def test_plan_changes_nothing(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    quantizer().plan(model)
    assert names(model) == []
    assert not hasattr(model, "is_quantized")


def test_user_s_list_replaces_the_automatic_one(build_model: Callable[[], nn.Module]) -> None:
    plan = quantizer(["first"]).plan(build_model())
    assert [layer.name for layer in plan.layers] == ["second", "lm_head"]


def test_pattern_that_hits_nothing_is_warned_about(
    build_model: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    quantizer(["first", "frist"]).plan(build_model())
    assert "['frist']" in caplog.text


def test_layer_left_by_the_format_has_that_reason(build_model: Callable[[], nn.Module]) -> None:
    class Some(TinyInt8Quantizer):
        def format_for(self, name: str, module: nn.Module) -> Any:
            return None if name == "first" else TinyInt8()

    assert Some(TinyInt8Config()).plan(build_model()).left["first"] == "left float by the config"


def test_every_shape_that_does_not_fit_is_in_one_error(build_model: Callable[[], nn.Module]) -> None:
    class Odd(TinyInt8Quantizer):
        def format_for(self, name: str, module: nn.Module) -> TinyInt8:
            return TinyInt8(multiple=7)

    with pytest.raises(ValueError, match="first: in_features 16 is not a multiple of 7\nsecond: in_features 32"):
        Odd(TinyInt8Config()).plan(build_model())


def test_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no Linear layers to quantize"):
        quantizer().plan(nn.Sequential(nn.Conv1d(1, 1, 1), nn.LayerNorm(2)))


def test_model_whose_layers_are_all_skipped_is_refused(build_model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"every Linear layer of TwoLayers is left float .*or its skip list"):
        quantizer(["first", "second", "lm_head"]).plan(build_model())


def test_single_layer_is_pointed_to_from_linear() -> None:
    with pytest.raises(ValueError, match="from_linear"):
        quantizer().plan(nn.Linear(2, 2))


# Quantizing in place


def test_quantize_returns_the_same_model(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    assert quantcore.quantize(model, "tiny-int8") is model
    assert names(model) == ["first", "second"]


def test_quantized_layer_equals_the_layer_on_its_own(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    alone = QuantizedLinear.from_linear(model.first, TinyInt8())  # type: ignore[arg-type]
    quantcore.quantize(model, TinyInt8Config())
    assert torch.equal(model.first.dequantize(), alone.dequantize())  # type: ignore[union-attr, operator]


def test_hooks_run_with_the_layer_that_takes_the_place_of_theirs(build_model: Callable[[], nn.Module]) -> None:
    model, seen = build_model(), []
    handle = model.first.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    x = torch.randn(1, 16)
    quantcore.quantize(model, "tiny-int8")
    model(x)
    quantcore.dequantize(model)
    model(x)
    handle.remove()
    model(x)
    assert seen == [QuantizedLinear, nn.Linear]


@pytest.mark.parametrize("thing", [None, "folder", {}], ids=repr)
@pytest.mark.parametrize("verb", [lambda it: quantcore.quantize(it, "tiny-int8"), quantcore.dequantize])
def test_what_is_no_module_is_refused(verb: Callable[[Any], Any], thing: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got"):
        verb(thing)


def test_class_of_a_config_is_refused(build_model: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match="got the class TinyInt8Config; call it"):
        quantcore.quantize(build_model(), TinyInt8Config)


def test_layers_know_their_names(build_model: Callable[[], nn.Module]) -> None:
    model = quantcore.quantize(build_model(), "tiny-int8")
    assert [module.name for _, module in quantized_modules(model)] == ["first", "second"]


def test_what_is_skipped_is_untouched(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    head, norm = model.lm_head, model.norm
    quantcore.quantize(model, "tiny-int8")
    assert (model.lm_head, model.norm) == (head, norm)


def test_quantized_model_is_marked(build_model: Callable[[], nn.Module]) -> None:
    model = quantcore.quantize(build_model(), "tiny-int8")
    assert (model.is_quantized, model.quantization_method) == (True, "tiny-int8")
    assert type(model.hf_quantizer) is TinyInt8Quantizer


def test_counts_and_reasons_are_logged(build_model: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quantcore"):
        quantcore.quantize(build_model(), "tiny-int8")
    assert "quantizing 2 layers: 1024 of 1171 weights (87.4 %), stored in 1216 bytes" in caplog.text
    assert "lm_head stays float: skipped by 'lm_head'" in caplog.text
    assert "only" not in caplog.text


def test_model_of_which_most_stays_float_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(100, 8), "up": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    quantcore.quantize(model, "tiny-int8")
    expected = "only 7 % of the weights are quantized; most of the others: tokens.weight (90 %), up.bias"
    assert expected in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_bad_weight_in_the_last_layer_leaves_the_model_as_it_was(
    build_model: Callable[[], nn.Module], value: float
) -> None:
    model = build_model()
    with torch.no_grad():
        model.second.weight[4, 2] = value  # type: ignore[union-attr, operator]
    before, attributes = snapshot(model), set(vars(model))
    with pytest.raises(ValueError, match="second: weight holds NaN or inf, first in row 4"):
        quantcore.quantize(model, "tiny-int8")
    assert names(model) == []
    assert set(vars(model)) == attributes
    assert all(
        torch.equal(tensor, before[name][1]) or name == "second.weight" for name, tensor in model.state_dict().items()
    )


def refuses(calls: list[int], at: int, error: BaseException) -> Callable[..., Any]:
    """A `quantize` of TinyInt8 that raises when it is called for the at-th time."""
    quantize = TinyInt8.quantize

    def refusing(self: TinyInt8, weight: torch.Tensor) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            raise error
        return quantize(self, weight)

    return refusing


def test_weight_beyond_its_format_leaves_the_model_as_it_was(
    build_model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    with torch.no_grad():
        model.second.weight[4, 2] = 1e30  # type: ignore[union-attr, operator]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(TinyInt8, "quantize", refuses([], 1, ValueError("it reaches too far")))
    with pytest.raises(ValueError, match=r"^second: it reaches too far$"):
        quantcore.quantize(model, "tiny-int8")
    assert names(model) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refusal_halfway_says_that_the_model_is_half_done(
    build_model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model()
    monkeypatch.setattr(TinyInt8, "quantize", refuses([], 2, ValueError("it does not fit")))
    said = r"second: it does not fit\nTwoLayers is left half done: 1 layer is quantized already, up to first, .* anew"
    with pytest.raises(ValueError, match=said):
        quantcore.quantize(model, "tiny-int8")
    assert names(model) == ["first"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no room")], ids=lambda error: type(error).__name__)
def test_what_ends_it_halfway_stays_as_it_is_and_the_log_says_what_is_left(
    build_model: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
) -> None:
    monkeypatch.setattr(TinyInt8, "quantize", refuses([], 2, error))
    with pytest.raises(type(error)):
        quantcore.quantize(build_model(), "tiny-int8")
    assert "TwoLayers is left half done: 1 layer is quantized already" in caplog.text


def test_model_on_the_meta_device_is_refused(build_model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="first: weight is on the meta device"):
        quantcore.quantize(build_model().to("meta"), "tiny-int8")


def test_quantized_model_is_not_quantized_again(build_model: Callable[[], nn.Module]) -> None:
    model = quantcore.quantize(build_model(), "tiny-int8")
    with pytest.raises(ValueError, match=r"TwoLayers is quantized already; quantcore.dequantize it first"):
        quantcore.quantize(model, "tiny-int8")


def test_calibration_data_that_nobody_takes_is_refused(build_model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="tiny-int8 takes no calibration data"):
        quantcore.quantize(build_model(), "tiny-int8", calibration=[torch.zeros(1, 16)])


def test_quantizer_that_only_loads_is_refused(build_model: Callable[[], nn.Module]) -> None:
    @quantcore.register_quantizer("tiny-int8", override=True)
    class OnlyLoads(quantcore.HfQuantizer):
        pass

    with pytest.raises(TypeError, match="OnlyLoads only loads checkpoints"):
        quantcore.quantize(build_model(), "tiny-int8")


# And back


def test_dequantized_model_computes_the_same(build_model: Callable[[], nn.Module]) -> None:
    model, x = quantcore.quantize(build_model(), "tiny-int8"), torch.randn(2, 16)
    expected = model(x)
    assert torch.equal(quantcore.dequantize(model)(x), expected)
    assert names(model) == []


def test_dequantized_model_bears_no_trace(build_model: Callable[[], nn.Module]) -> None:
    untouched = set(vars(build_model()))
    model = quantcore.dequantize(quantcore.quantize(build_model(), "tiny-int8"))
    assert set(vars(model)) - untouched == {"is_quantized"}
    assert model.is_quantized is False


def test_dequantize_takes_a_dtype(build_model: Callable[[], nn.Module]) -> None:
    model = quantcore.dequantize(quantcore.quantize(build_model(), "tiny-int8"), torch.float16)
    assert model.first.weight.dtype == torch.float16  # type: ignore[union-attr]


def test_dequantized_model_can_be_quantized_again_to_the_same_bytes(build_model: Callable[[], nn.Module]) -> None:
    model = quantcore.quantize(build_model(), "tiny-int8")
    before = copy.deepcopy(model.state_dict())
    again = quantcore.quantize(quantcore.dequantize(model), "tiny-int8").state_dict()
    # The scale is recomputed from the largest value, 127 * scale: one rounding, at most one unit in the last place.
    assert torch.equal(again["first.weight"], before["first.weight"])
    torch.testing.assert_close(again["first.weight.scale"], before["first.weight.scale"], rtol=2**-23, atol=0)


def test_layers_put_in_by_hand_are_dequantized(build_model: Callable[[], nn.Module]) -> None:
    model = build_model()
    model.first = QuantizedLinear.from_linear(model.first, TinyInt8())  # type: ignore[arg-type]
    assert names(quantcore.dequantize(model)) == []


def test_quantization_that_was_cut_short_can_be_undone(build_model: Callable[[], nn.Module]) -> None:
    class Stumbles(TinyInt8Quantizer):
        def _quantize_layer(self, model: nn.Module, name: str, weight_format: Any) -> None:
            if name == "second":
                raise KeyboardInterrupt
            super()._quantize_layer(model, name, weight_format)

    model = build_model()
    with pytest.raises(KeyboardInterrupt):
        Stumbles(TinyInt8Config(), pre_quantized=False).quantize_model(model)
    assert names(model) == ["first"]
    assert names(quantcore.quantize(quantcore.dequantize(model), "tiny-int8")) == ["first", "second"]


def test_float_model_is_not_dequantized(build_model: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="TwoLayers is not quantized by quantcore"):
        quantcore.dequantize(build_model())


# Layers that do not fit


class Picky(TinyInt8Quantizer):
    """Stores layers whose in_features are even."""

    leaves_misfits = True

    def format_for(self, name: str, module: nn.Module) -> TinyInt8:
        return TinyInt8(multiple=2)


def test_a_layer_that_does_not_fit_is_left_where_the_quantizer_says_so() -> None:
    model = nn.ModuleDict({"even": nn.Linear(4, 3), "odd": nn.Linear(5, 3)})
    plan = Picky(TinyInt8Config(), pre_quantized=False).plan(model)
    assert [layer.name for layer in plan.layers] == ["even"]
    assert plan.misfits == ("odd",)
    assert "in_features 5 is not a multiple of 2" in plan.left["odd"]


def test_a_model_without_a_layer_that_fits_is_an_error_that_says_why() -> None:
    model = nn.ModuleDict({"odd": nn.Linear(5, 3)})
    with pytest.raises(ValueError, match="odd: in_features 5 is not a multiple of 2"):
        Picky(TinyInt8Config(), pre_quantized=False).plan(model)


def test_skip_pattern_that_would_not_end_is_matched() -> None:
    assert not matches_pattern("model.layers.0.mlp." + "a" * 60, "(a+)+b|(.*.*.*)*!")
