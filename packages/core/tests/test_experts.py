"""Fused experts, taken apart and quantized: what they compute, how they are called, saved and put together again."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.checkpoints.read import Checkpoint
from quantcore.checkpoints.write import write_tensors
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedExperts, QuantizedLinear
from quantcore.nn.expert_weights import ExpertWeight, StackedWeight
from quantcore.nn.experts import fused_weights, linear_layers, split_experts
from quantcore.testing.compare import relative_error
from quantcore.testing.experts import (
    EXPERTS,
    HIDDEN,
    INNER,
    TOKENS,
    DenseExperts,
    FusedExperts,
    SmallMixtureModel,
    TransposedExperts,
)

KINDS = {"rows": FusedExperts, "columns": TransposedExperts, "batched": DenseExperts}
EXPERTS_NAME = "model.mlp.experts"
IDS = torch.arange(TOKENS)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> type[nn.Module]:
    return request.param


@pytest.fixture
def build(kind: type[nn.Module]) -> Callable[[], SmallMixtureModel]:
    return lambda: SmallMixtureModel(kind)


def quantized(kind: type[nn.Module] = FusedExperts, dtype: torch.dtype = torch.float32) -> SmallMixtureModel:
    return quantcore.quantize(SmallMixtureModel(kind, dtype), "tiny-int8")


def experts_of(model: nn.Module) -> QuantizedExperts:
    experts = model.get_submodule(EXPERTS_NAME)
    assert isinstance(experts, QuantizedExperts)
    return experts


def names_of_layers() -> list[str]:
    return [f"{EXPERTS_NAME}.{e}.{part}" for e in range(EXPERTS) for part in ("gate_proj", "up_proj", "down_proj")]


def test_layers_of_fused_experts_are_views_of_its_weights(build: Callable[[], SmallMixtureModel]) -> None:
    model = build()
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    layers = {name: layer for name, layer in linear_layers(model) if "experts" in name}
    assert sorted(layers) == sorted(names_of_layers())
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers.values()} <= storages
    assert isinstance(model.get_submodule(EXPERTS_NAME), FusedExperts)


def test_layers_have_the_shapes_of_linear_layers(build: Callable[[], SmallMixtureModel]) -> None:
    shapes = {name.rpartition(".")[2]: tuple(layer.weight.shape) for name, layer in linear_layers(build())}
    del shapes["lm_head"]
    assert shapes == {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def test_experts_taken_apart_compute_the_same(build: Callable[[], SmallMixtureModel]) -> None:
    model = build()
    expected = model(IDS)
    split_experts(model, names_of_layers())
    torch.testing.assert_close(model(IDS), expected)


def test_single_experts_module_is_quantized_and_the_source_left(tiny: None, kind: type[nn.Module]) -> None:
    model = SmallMixtureModel(kind)
    source = model.get_submodule(EXPERTS_NAME)
    single = QuantizedExperts.from_experts(source, {"quant_method": "tiny-int8"}, name=EXPERTS_NAME)
    expected = experts_of(quantized(kind)).state_dict()
    assert {name for name in single.state_dict() if torch.equal(single.state_dict()[name], expected[name])} == set(
        expected
    )
    assert isinstance(model.get_submodule(EXPERTS_NAME).get_parameter("down_proj"), nn.Parameter)


def test_skip_pattern_of_one_expert_is_no_pattern_that_hits_nothing(
    tiny: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": [f"{EXPERTS_NAME}.1", "lm_head"]}
    quantcore.quantize(SmallMixtureModel(), config)
    assert "no layer matches" not in caplog.text


def test_only_experts_with_a_named_layer_are_taken_apart() -> None:
    model = nn.ModuleDict({"first": FusedExperts(), "second": FusedExperts()})
    split_experts(model, ["second.0.up_proj"])
    assert isinstance(model["first"], FusedExperts)
    assert isinstance(model["second"], QuantizedExperts)


def test_names_of_the_parts_may_be_given() -> None:
    experts = QuantizedExperts(FusedExperts(), {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)})
    assert [name for name, _ in experts.named_layers()][:3] == ["0.w1", "0.w3", "0.w2"]


@pytest.mark.parametrize("module", [nn.Linear(3, 4), nn.Conv1d(3, 4, 5), nn.Module()], ids=["linear", "conv", "empty"])
def test_module_without_experts_is_refused(module: nn.Module) -> None:
    assert fused_weights(module) == ()
    with pytest.raises(TypeError, match="holds no experts"):
        QuantizedExperts(module)


def test_three_dimensions_without_that_many_experts_are_no_experts() -> None:
    module = FusedExperts()
    module.num_experts = EXPERTS + 1
    assert fused_weights(module) == ()


def test_quantized_model_computes_what_its_dequantized_weights_give(
    tiny: None, build: Callable[[], SmallMixtureModel]
) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    found = model(IDS)
    torch.testing.assert_close(found, quantcore.dequantize(model)(IDS))
    torch.testing.assert_close(found, build()(IDS), atol=1.0, rtol=0.05)  # 8 bits a weight


def test_every_expert_is_quantized_and_the_router_is_not(tiny: None, build: Callable[[], SmallMixtureModel]) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    layers = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers == set(names_of_layers())
    assert isinstance(model.get_parameter("model.mlp.gate"), nn.Parameter)


def test_dequantized_experts_are_the_architectures_own(tiny: None, build: Callable[[], SmallMixtureModel]) -> None:
    model = quantcore.dequantize(quantcore.quantize(build(), "tiny-int8"))
    original = build()
    experts = model.get_submodule(EXPERTS_NAME)
    assert type(experts) is type(original.get_submodule(EXPERTS_NAME))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dequantized_experts_keep_their_dtype_or_take_the_given(tiny: None, dtype: torch.dtype) -> None:
    experts = experts_of(quantized())
    assert experts.to_dense().gate_up_proj.dtype == torch.float32
    assert experts.to_dense(dtype).gate_up_proj.dtype == dtype


def test_gradient_of_the_input_is_that_of_the_dequantized_weights(
    tiny: None, build: Callable[[], SmallMixtureModel]
) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    dense = quantcore.dequantize(copy.deepcopy(model))
    grads = []
    for each in (model, dense):
        x = torch.linspace(-1, 1, 5 * HIDDEN).view(5, HIDDEN).requires_grad_()
        each.model.mlp(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(grads[0], grads[1]) <= 1e-5  # float32 sums in another order


def test_state_dict_has_a_name_for_each_expert(tiny: None) -> None:
    names = list(quantized().state_dict())
    assert f"{EXPERTS_NAME}.2.up_proj.weight.scale" in names
    assert not [name for name in names if "gate_up_proj" in name]


def test_state_dict_of_one_model_loads_into_another(tiny: None, build: Callable[[], SmallMixtureModel]) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    other = quantcore.quantize(other, "tiny-int8")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))


def test_saved_model_loads_with_equal_results(
    tiny: None, build: Callable[[], SmallMixtureModel], tmp_path: Path
) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    quantcore.save(model, tmp_path / "q")
    loaded = quantcore.load(tmp_path / "q", build)
    assert torch.equal(loaded(IDS), model(IDS))
    assert set(Checkpoint(tmp_path / "q").headers) == set(model.state_dict())


def test_stored_experts_that_are_damaged_are_all_named(tiny: None, tmp_path: Path) -> None:
    quantcore.save(quantized(), tmp_path / "q")
    tensors = dict(Checkpoint(tmp_path / "q").stream())
    del tensors[f"{EXPERTS_NAME}.1.up_proj.weight.scale"]
    tensors[f"{EXPERTS_NAME}.2.down_proj.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    write_tensors(tensors, tmp_path / "q")
    model = SmallMixtureModel()
    with pytest.raises(CheckpointError, match=r"(?s)1\.up_proj.*weight\.scale.*2\.down_proj"):
        quantcore.load(tmp_path / "q", model)
    assert isinstance(model.get_submodule(EXPERTS_NAME), FusedExperts)


def test_experts_that_the_config_leaves_float_stay_fused(tiny: None, tmp_path: Path) -> None:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": [EXPERTS_NAME]}
    model = quantcore.quantize(SmallMixtureModel(), config)
    assert isinstance(model.get_submodule(EXPERTS_NAME), FusedExperts)
    quantcore.save(model, tmp_path / "q")
    assert torch.equal(quantcore.load(tmp_path / "q", SmallMixtureModel)(IDS), model(IDS))


def test_single_expert_may_stay_float(tiny: None, tmp_path: Path) -> None:
    config = {"quant_method": "tiny-int8", "modules_to_not_convert": [f"{EXPERTS_NAME}.1", "lm_head"]}
    model = quantcore.quantize(SmallMixtureModel(), config)
    assert type(model.get_submodule(f"{EXPERTS_NAME}.1.up_proj")) is nn.Linear
    assert isinstance(model.get_submodule(f"{EXPERTS_NAME}.2.up_proj"), QuantizedLinear)
    quantcore.save(model, tmp_path / "q")
    assert torch.equal(quantcore.load(tmp_path / "q", SmallMixtureModel)(IDS), model(IDS))


def test_float_checkpoint_with_a_tensor_for_each_expert_loads(tmp_path: Path) -> None:
    model = SmallMixtureModel()
    expected = model(IDS)
    split_experts(model, names_of_layers())
    write_tensors({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path)
    loaded = quantcore.load(tmp_path, SmallMixtureModel)
    torch.testing.assert_close(loaded(IDS), expected)
    assert type(loaded.get_submodule(EXPERTS_NAME)) is FusedExperts
    assert loaded.get_parameter(f"{EXPERTS_NAME}.down_proj").requires_grad


@pytest.fixture
def with_biases(tmp_path: Path) -> Path:
    """A float checkpoint with a weight and a bias for each layer of each expert, of interleaved [E, K, N] weights."""
    model = SmallMixtureModel(TransposedExperts)
    fused = model.model.mlp.experts
    tensors = {name: tensor for name, tensor in model.state_dict().items() if ".experts." not in name}
    for weight in fused_weights(fused):
        biases = weight.split_rows(fused.get_parameter(f"{weight.name}_bias").detach())
        for part, own in zip(weight.parts, biases, strict=True):
            tensors |= {f"{EXPERTS_NAME}.{expert}.{part}.bias": bias.clone() for expert, bias in enumerate(own)}
    for name, layer in linear_layers(model):
        if ".experts." in name:
            tensors[f"{name}.weight"] = layer.weight.detach().clone()
    folder = tmp_path / "biases"
    folder.mkdir()
    write_tensors(tensors, folder, "5GB")
    (folder / "config.json").write_text('{"model_type": "small"}')
    return folder


def test_float_checkpoint_with_a_bias_for_each_expert_loads(with_biases: Path) -> None:
    loaded = quantcore.load(with_biases, lambda: SmallMixtureModel(TransposedExperts))
    expected = SmallMixtureModel(TransposedExperts)
    assert {name: type(module) for name, module in loaded.named_modules()} == {
        name: type(module) for name, module in expected.named_modules()
    }
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_biases_of_single_experts_stay_with_their_layers(tiny: None, with_biases: Path, tmp_path: Path) -> None:
    build = lambda: SmallMixtureModel(TransposedExperts)  # noqa: E731
    quantcore.quantize_checkpoint(with_biases, tmp_path / "q", "tiny-int8", model=build)
    stored = {name for name in Checkpoint(tmp_path / "q").headers if name.endswith("bias") and EXPERTS_NAME in name}
    assert stored == {f"{name}.bias" for name in names_of_layers()}
    model = quantcore.load(tmp_path / "q", build)
    layers = dict(experts_of(model).named_layers())
    assert all(isinstance(layer, QuantizedLinear) and layer.bias is not None for layer in layers.values())
    torch.testing.assert_close(model(IDS), quantized(TransposedExperts)(IDS))  # torch adds a bias within the product
    quantcore.save(model, tmp_path / "again")
    assert torch.equal(quantcore.load(tmp_path / "again", build)(IDS), model(IDS))
    assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))
    dense = quantcore.dequantize(model)
    assert torch.equal(dense.model.mlp.experts.down_proj_bias, build().model.mlp.experts.down_proj_bias)
    assert torch.equal(dense.model.mlp.experts.gate_up_proj_bias, build().model.mlp.experts.gate_up_proj_bias)


def test_weight_with_nan_is_named_by_expert_and_the_model_is_left(tiny: None) -> None:
    model = SmallMixtureModel()
    with torch.no_grad():
        model.get_submodule(EXPERTS_NAME).gate_up_proj[2, INNER + 3, 5] = torch.nan
    with pytest.raises(ValueError, match=rf"{EXPERTS_NAME}\.2\.up_proj.*row 3"):
        quantcore.quantize(model, "tiny-int8")
    assert isinstance(model.get_submodule(EXPERTS_NAME), FusedExperts)


def test_moves_copies_and_pickles_compute_the_same(tiny: None, build: Callable[[], SmallMixtureModel]) -> None:
    model = quantcore.quantize(build(), "tiny-int8")
    expected = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), expected)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - bytes of this test
    assert torch.equal(again(IDS), expected)
    stored = experts_of(model.to(torch.bfloat16)).get_submodule("0.up_proj").stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.int8, torch.float32}


def test_compiled_model_computes_the_same(tiny: None) -> None:
    model = quantized()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))


def test_float_weights_are_let_go_as_experts_are_quantized(tiny: None) -> None:
    model = SmallMixtureModel()
    fused = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters() if parameter.ndim == 3]
    quantcore.quantize(model, "tiny-int8")
    assert [storage() for storage in fused] == [None, None]


class TestStandIns:
    """What model code meets in place of a 3-D weight."""

    def test_it_has_the_shape_dtype_and_device_of_the_weight(self, tiny: None, kind: type[nn.Module]) -> None:
        weight = experts_of(quantized(kind)).down_proj
        assert isinstance(weight, StackedWeight)
        assert weight.shape == kind().down_proj.shape
        assert (weight.dtype, weight.device.type, weight.ndim) == (torch.float32, "cpu", 3)
        assert weight.size(0) == len(weight) == EXPERTS

    def test_one_expert_dequantizes_to_its_matrix(self, tiny: None, kind: type[nn.Module]) -> None:
        experts = experts_of(quantized(kind))
        for name in ("gate_up_proj", "down_proj"):
            whole = experts.to_dense().get_parameter(name)
            assert isinstance(getattr(experts, name)[1], ExpertWeight)
            assert torch.equal(getattr(experts, name)[1].dense(), whole[1])
            assert torch.equal(getattr(experts, name)[torch.tensor([0, 2])], whole[[0, 2]])
            assert torch.equal(getattr(experts, name)[1:3], whole[1:3])

    def test_functions_that_are_not_served_run_on_the_float_weight(self, tiny: None, kind: type[nn.Module]) -> None:
        experts = experts_of(quantized(kind))
        whole = experts.to_dense().down_proj
        assert torch.equal(torch.abs(experts.down_proj), whole.abs())
        assert torch.equal(torch.einsum("ab->ba", experts.down_proj[2]), whole[2].t())
        assert torch.equal(experts.down_proj[2].t(), whole[2].t())

    def test_negative_and_last_numbers_count_as_in_a_tensor(self, tiny: None) -> None:
        down = experts_of(quantized()).down_proj
        assert torch.equal(down[-1].dense(), down[EXPERTS - 1].dense())
        assert len(list(down)) == EXPERTS

    def test_expert_that_does_not_exist_is_an_index_error(self, tiny: None) -> None:
        with pytest.raises(IndexError, match="expert 3 of down_proj: there are 3"):
            experts_of(quantized()).down_proj[EXPERTS]

    def test_attribute_that_nobody_has_is_an_attribute_error(self, tiny: None) -> None:
        with pytest.raises(AttributeError, match="no_such"):
            experts_of(quantized()).no_such  # noqa: B018

    def test_linear_takes_a_bias_as_usual(self, tiny: None) -> None:
        down = experts_of(quantized()).down_proj
        x, bias = torch.ones(2, INNER), torch.arange(HIDDEN).float()
        expected: Tensor = nn.functional.linear(x, down[0].dense(), bias)
        torch.testing.assert_close(nn.functional.linear(x, down[0], bias), expected)


class TestFromFileToFile:
    """Quantizing a folder without a model in memory."""

    @pytest.mark.parametrize("apart", [False, True], ids=["fused", "one_by_one"])
    def test_result_is_that_of_the_loaded_model(
        self, tiny: None, kind: type[nn.Module], tmp_path: Path, apart: bool
    ) -> None:
        model = SmallMixtureModel(kind)
        if apart:
            split_experts(model, names_of_layers())
        (tmp_path / "float").mkdir()
        write_tensors({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "float")
        (tmp_path / "float" / "config.json").write_text('{"architectures": ["SmallMixtureModel"]}')
        config, build = {"quant_method": "tiny-int8"}, lambda: SmallMixtureModel(kind)
        quantcore.quantize_checkpoint(tmp_path / "float", tmp_path / "q", config, model=build)
        expected = quantcore.quantize(build(), config)
        assert torch.equal(quantcore.load(tmp_path / "q", build)(IDS), expected(IDS))
        assert set(Checkpoint(tmp_path / "q").headers) == set(expected.state_dict())
