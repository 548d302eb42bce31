"""The layer over a quantized weight: names, moves, copies, state dicts, and what models do to layers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_int8 import TinyInt8, TinyInt8Config
from torch import Tensor, nn
from torch.func import functional_call

import quantcore
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.nn.dense import build_dense, view_dense
from quantcore.nn.replace import quantized_modules, replace_module

N, K = 5, 6

# Suffixes that are hard to keep: dots, names of the layer's own attributes, names that differ only by a dot.
NAMES = [
    ("weight", "weight.scale"),
    ("W_q", "scale"),
    ("bias2", "weight"),
    ("shape", "format"),
    ("name", "training"),
    ("forward", "to"),
    ("dense_type", "in_features"),
    ("_parameters", "_operands"),
    ("weight.scale", "weight_scale"),
    ("weight_scale", "weight.scale"),
    ("a.b.c", "a_b.c"),
    ("shape", "shape_"),
    ("weight.quant_state.x__y", "weight"),
]
NAMED = pytest.mark.parametrize("names", NAMES, ids="-".join)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def dense(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random(N, K))
        if bias:
            linear.bias.copy_(random(N))
    return linear


def quantized(
    names: tuple[str, str] = ("weight", "weight.scale"), bias: bool = True, **options: Any
) -> QuantizedLinear:
    return QuantizedLinear.from_linear(dense(bias, **options), TinyInt8(names), name="model.layer")


def raw(layer: QuantizedLinear) -> dict[str, tuple[torch.dtype, bytes]]:
    """Dtype and bytes of each stored tensor."""
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in layer.stored.items()
    }


# Construction


def test_layer_computes_with_the_dequantized_weight() -> None:
    layer, x = quantized(), random(3, K)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias))


def test_from_linear_leaves_the_linear_alone() -> None:
    linear = dense()
    before = copy.deepcopy(linear.state_dict())
    layer = QuantizedLinear.from_linear(linear, TinyInt8())
    layer.bias.data.zero_()  # type: ignore[union-attr]
    assert all(torch.equal(before[name], tensor) for name, tensor in linear.state_dict().items())


@pytest.mark.parametrize(
    "given",
    [TinyInt8Config(), {"quant_method": "tiny-int8"}, "tiny-int8", TinyInt8()],
    ids=["config", "dict", "name", "format"],
)
def test_from_linear_takes_a_config_in_any_form(tiny: None, given: Any) -> None:
    layer = QuantizedLinear.from_linear(dense(), given)
    assert torch.equal(layer.dequantize(), quantized().dequantize())


def test_from_tensors_is_the_inverse_of_state_dict(tiny: None) -> None:
    layer = quantized()
    again = QuantizedLinear.from_tensors("tiny-int8", layer.state_dict(), in_features=K, out_features=N)
    assert torch.equal(again(random(2, K)), layer(random(2, K)))


def test_layer_without_bias_stays_without() -> None:
    layer = quantized(bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()


def test_zero_row_gives_a_zero_row() -> None:
    linear = dense()
    with torch.no_grad():
        linear.weight[2] = 0
    assert torch.equal(QuantizedLinear.from_linear(linear, TinyInt8()).dequantize()[2], torch.zeros(K))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_weight_names_layer_and_row(value: float) -> None:
    linear = dense()
    with torch.no_grad():
        linear.weight[3, 1] = value
    with pytest.raises(ValueError, match=r"model.layer: weight holds NaN or inf, first in row 3"):
        QuantizedLinear.from_linear(linear, TinyInt8(), name="model.layer")


def test_finite_weight_whose_sum_overflows_is_accepted() -> None:
    linear = dense()
    nn.init.constant_(linear.weight, 3e38)
    assert torch.isfinite(QuantizedLinear.from_linear(linear, TinyInt8()).dequantize()).all()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Conv1d(2, 2, 1), "expected nn.Linear or Conv1D, got Conv1d"),
        (nn.Embedding(2, 2), "got Embedding"),
        ("linear", "got str"),
    ],
    ids=["conv", "embedding", "string"],
)
def test_module_of_another_kind_is_a_type_error(module: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"up_proj: .*{text}"):
        QuantizedLinear.from_linear(module, TinyInt8(), name="up_proj")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weight_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"up_proj: weight \[0, 3\] has no elements"):
        QuantizedLinear.from_linear(nn.Linear(3, 0), TinyInt8(), name="up_proj")


def test_integer_weight_is_refused_by_name() -> None:
    linear = dense()
    linear.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj: weight is torch.int8, not a float"):
        QuantizedLinear.from_linear(linear, TinyInt8(), name="up_proj")


def test_weight_on_the_meta_device_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="up_proj: weight is on the meta device"):
        QuantizedLinear.from_linear(nn.Linear(K, N, device="meta"), TinyInt8(), name="up_proj")


def test_shape_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(ValueError, match="up_proj: in_features 6 is not a multiple of 4"):
        QuantizedLinear.from_linear(dense(), TinyInt8(multiple=4), name="up_proj")


def test_calibration_that_nobody_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="TinyInt8 takes no calibration data"):
        QuantizedLinear.from_linear(dense(), TinyInt8(), calibration=[random(1, K)])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_smallest_shapes_work(shape: tuple[int, int]) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(shape[1], shape[0]), TinyInt8())
    assert layer(random(2, shape[1])).shape == (2, shape[0])


def test_non_contiguous_weight_is_quantized_as_its_values() -> None:
    linear = dense()
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    assert raw(QuantizedLinear.from_linear(linear, TinyInt8())) == raw(quantized())


# Bad tensors


def test_from_tensors_lists_every_fault_at_once() -> None:
    tensors = {"weight": torch.zeros(N, K), "weight.scales": torch.zeros(N, 1)}
    with pytest.raises(CheckpointError) as caught:
        QuantizedLinear.from_tensors(TinyInt8(), tensors, in_features=K, out_features=N, name="up_proj")
    text = str(caught.value)
    assert text.startswith("up_proj: ")
    assert "weight.scale: missing, expected float32 [5, 1]" in text
    assert "weight: expected int8 [5, 6], got float32 [5, 6]" in text
    assert "weight.scales: surplus" in text


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (torch.zeros(N + 1), r"bias: expected float32 \[5\], got float32 \[6\]"),
        (torch.zeros(N, dtype=torch.int32), r"bias: expected float32 \[5\], got int32 \[5\]"),
    ],
    ids=["shape", "dtype"],
)
def test_bias_that_does_not_fit_is_refused(bias: Tensor, text: str) -> None:
    tensors = {**quantized().state_dict(), "bias": bias}
    with pytest.raises(ValueError, match=f"up_proj: {text}"):
        QuantizedLinear.from_tensors(TinyInt8(), tensors, in_features=K, out_features=N, name="up_proj")


@pytest.mark.parametrize("shape", [(K + 1,), (2, K - 1), (0, 1)], ids=str)
def test_input_of_the_wrong_width_is_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"model.layer: expected input \[\.\.\., 6\], got \[.*{shape[-1]}\]"):
        quantized()(torch.zeros(shape))


def test_integer_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"model.layer: expected a float input, got torch.int64"):
        quantized()(torch.zeros(2, K, dtype=torch.int64))


# Names


@NAMED
def test_state_dict_shows_the_checkpoint_names(names: tuple[str, str]) -> None:
    assert set(quantized(names).state_dict()) == {*names, "bias"}


@NAMED
def test_names_do_not_change_the_numbers(names: tuple[str, str]) -> None:
    assert torch.equal(quantized(names)(random(3, K)), quantized()(random(3, K)))


@NAMED
def test_state_dict_round_trip_under_any_name(names: tuple[str, str]) -> None:
    source = quantized(names)
    with torch.device("meta"):
        empty = QuantizedLinear(
            TinyInt8(names), source.stored, torch.zeros(N, device="meta"), in_features=K, out_features=N
        ).to("meta")
    empty.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(empty(random(3, K)), source(random(3, K)))


@NAMED
def test_copies_keep_any_name(names: tuple[str, str]) -> None:
    layer = quantized(names)
    assert set(copy.deepcopy(layer).state_dict()) == set(layer.state_dict())


@NAMED
def test_names_leave_the_layer_s_own_attributes_alone(names: tuple[str, str]) -> None:
    layer = quantized(names)
    assert (layer.in_features, layer.out_features, layer.shape, layer.name) == (K, N, (N, K), "model.layer")
    assert (layer.format, layer.training, layer.dense_type) == (TinyInt8(names), True, nn.Linear)


def test_state_dict_of_a_model_has_dotted_names() -> None:
    assert set(nn.Sequential(quantized()).state_dict(prefix="m.")) == {"m.0.weight", "m.0.weight.scale", "m.0.bias"}


def test_weight_is_readable_when_the_format_stores_it_under_another_name() -> None:
    layer = quantized(("W_q", "scale"))
    assert torch.equal(layer.weight, layer.dequantize())


def test_weight_is_a_float_matrix_whatever_the_stored_tensor_is_called() -> None:
    layer = quantized()
    assert torch.equal(layer.weight, layer.dequantize())
    assert torch.equal(layer.weight[:, 1:3], layer.dequantize()[:, 1:3])
    assert not layer.weight.requires_grad
    assert layer.half().weight.dtype == torch.float16
    assert layer.stored["weight"].dtype == torch.int8


def test_absent_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        quantized().no_such_thing  # noqa: B018 - the access is what is tested


def test_stored_tensors_are_frozen_parameters() -> None:
    layer = quantized()
    assert all(isinstance(tensor, nn.Parameter) and not tensor.requires_grad for tensor in layer.stored.values())


def test_repr_shows_shape_and_format() -> None:
    assert repr(quantized()).startswith("QuantizedLinear(in_features=6, out_features=5, bias=True, format=TinyInt8(")


def test_bits_per_weight_is_measured_from_the_tensors() -> None:
    assert quantized().bits_per_weight == 8 * (N * K + 4 * N) / (N * K)


# Moving and casting

CASTS = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.float16),
    "to-device-dtype": lambda layer: layer.to("cpu", torch.float16),
    "type": lambda layer: layer.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_never_touches_packed_bytes(cast: Callable[[Any], Any]) -> None:
    layer = quantized()
    before = raw(layer)
    cast(layer)
    assert raw(layer) == before


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_cast_reaches_the_bias(cast: Callable[[Any], Any]) -> None:
    assert cast(quantized()).bias.dtype != torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_input_dtype_works_whatever_the_bias(dtype: torch.dtype) -> None:
    assert quantized().half()(random(2, K, dtype=dtype)).dtype == dtype


def test_move_to_meta_keeps_names_shapes_and_dtypes() -> None:
    layer = quantized()
    before = {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items()}
    after = {name: (tensor.dtype, tensor.shape) for name, tensor in layer.to("meta").state_dict().items()}
    assert after == before
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


def test_to_empty_makes_room_for_a_meta_layer() -> None:
    source = quantized()
    layer = copy.deepcopy(source).to("meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(random(2, K)), source(random(2, K)))


def test_shared_memory_holds_the_same_numbers() -> None:
    layer = quantized()
    expected = layer(random(2, K))
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in layer.parameters())
    assert torch.equal(layer(random(2, K)), expected)


# Copies


def test_deep_copy_shares_no_memory() -> None:
    layer = quantized()
    twin = copy.deepcopy(layer)
    before = raw(layer)
    for tensor in twin.stored.values():
        tensor.zero_()
    assert raw(layer) == before


def test_pickle_gives_the_same_layer() -> None:
    layer = quantized()
    again = pickle.loads(pickle.dumps(layer))  # noqa: S301 - our own bytes
    assert raw(again) == raw(layer)
    assert torch.equal(again(random(2, K)), layer(random(2, K)))


def test_pickle_opens_in_a_fresh_process(run_python: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "layer.pickle").write_bytes(pickle.dumps(quantized()))
    code = """
        import pickle, torch
        layer = pickle.load(open("layer.pickle", "rb"))
        print(layer(torch.ones(1, 6)).tolist())
    """
    expected = quantized()(torch.ones(1, K)).tolist()
    assert run_python(code).stdout.strip() == str(expected)


def test_torch_save_gives_the_same_layer() -> None:
    buffer = io.BytesIO()
    torch.save(quantized(), buffer)
    buffer.seek(0)
    assert raw(torch.load(buffer, weights_only=False)) == raw(quantized())


# Loading a state dict


def other() -> QuantizedLinear:
    """A layer of the same shape and other values."""
    linear = dense()
    nn.init.constant_(linear.weight, 0.5)
    nn.init.zeros_(linear.bias)
    return QuantizedLinear.from_linear(linear, TinyInt8())


def test_loaded_layer_equals_its_source() -> None:
    layer, source = quantized(), other()
    result = layer.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(layer(random(2, K)), source(random(2, K)))


def test_loading_copies_unless_told_to_assign() -> None:
    layer, source = quantized(), other()
    layer.load_state_dict(source.state_dict())
    assert all(
        mine.data_ptr() != theirs.data_ptr()
        for mine, theirs in zip(layer.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_assigned_tensors_share_memory_with_the_state_dict() -> None:
    layer, source = quantized(), other()
    layer.load_state_dict(source.state_dict(), assign=True)
    state = source.state_dict()
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in layer.state_dict().items())


def test_meta_layer_is_filled_by_assigning() -> None:
    source = other()
    layer = copy.deepcopy(quantized()).to("meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(random(2, K)), source(random(2, K)))


def test_layer_inside_a_model_loads_by_prefix() -> None:
    model, source = nn.Sequential(nn.Identity(), quantized()), nn.Sequential(nn.Identity(), other())
    model.load_state_dict(source.state_dict())
    assert raw(model[1]) == raw(source[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weight", "weight.scale", "bias"])
def test_missing_key_is_named(name: str) -> None:
    state = quantized().state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{name}"'):
        quantized().load_state_dict(state)


def test_surplus_key_is_named() -> None:
    state = {**quantized().state_dict(), "weight.extra": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"weight.extra"):
        quantized().load_state_dict(state)


def test_wrong_tensors_are_named_in_one_error() -> None:
    state = {**quantized().state_dict(), "weight": torch.zeros(N, K), "bias": torch.zeros(2)}
    with pytest.raises(RuntimeError) as caught:
        quantized().load_state_dict(state)
    assert "weight: expected int8 [5, 6], got float32 [5, 6]" in str(caught.value)
    assert "bias: expected [5], got [2]" in str(caught.value)


def test_failed_load_leaves_the_stored_tensors_alone() -> None:
    layer = quantized()
    before = raw(layer)
    with pytest.raises(RuntimeError):
        layer.load_state_dict({**other().state_dict(), "weight.scale": torch.zeros(1)})
    assert raw(layer) == before


def test_state_dict_without_a_layer_s_keys_leaves_it_alone_when_not_strict() -> None:
    layer = quantized()
    before = raw(layer)
    result = layer.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == ["bias", "weight", "weight.scale"]
    assert raw(layer) == before


# Hooks and additions


def test_state_dict_hooks_run() -> None:
    layer, seen = quantized(), []
    layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(sorted(state)))
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: seen.append(prefix))
    layer.register_load_state_dict_post_hook(lambda module, incompatible: seen.append("after"))
    layer.load_state_dict(layer.state_dict())
    assert seen == [["bias", "weight", "weight.scale"], "", "after"]


def test_forward_hooks_run() -> None:
    layer, seen = quantized(), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(random(2, K))
    assert seen == [(2, N)]


class WithAdapter(nn.Module):
    """What LoRA does: trains a child of a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = quantized()
        self.layer.add_module("lora", nn.Sequential(nn.Linear(K, 2, bias=False), nn.Linear(2, N, bias=False)))
        self.layer.register_parameter("alpha", nn.Parameter(torch.tensor(0.5)))
        self.layer.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer.alpha * self.layer.lora(x)


def test_children_parameters_and_buffers_of_a_layer_are_saved() -> None:
    added = {"layer.lora.0.weight", "layer.lora.1.weight", "layer.alpha", "layer.count"}
    assert set(WithAdapter().state_dict()) == added | {"layer.weight", "layer.weight.scale", "layer.bias"}


def test_children_parameters_and_buffers_of_a_layer_are_loaded() -> None:
    source, target = WithAdapter(), WithAdapter()
    source.layer.count.fill_(9)
    source.layer.alpha.data.fill_(0.25)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(random(2, K)), source(random(2, K)))
    assert target.layer.count == 9


def test_only_the_adapter_is_trained() -> None:
    model = WithAdapter()
    model(random(2, K)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"layer.lora.0.weight", "layer.lora.1.weight", "layer.alpha"}


def test_gradient_reaches_what_comes_before() -> None:
    first = nn.Linear(K, K)
    nn.Sequential(first, quantized())(random(2, K)).sum().backward()
    assert first.weight.grad is not None


def test_checkpointed_layer_gives_the_same_gradient() -> None:
    layer, x = quantized(), random(2, K).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    y = random(2, K).requires_grad_()
    layer(y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_functional_call_exchanges_the_tensors() -> None:
    layer, source = quantized(), other()
    result = functional_call(layer, dict(source.named_parameters()), (random(2, K),))
    assert torch.equal(result, source(random(2, K)))


def test_layer_compiles_into_one_graph() -> None:
    layer = quantized()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5):
        assert torch.equal(compiled(random(rows, K)), layer(random(rows, K)))


# Back to a dense layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_dense_layer_has_the_dequantized_weight(bias: bool) -> None:
    layer = quantized(bias=bias)
    linear = layer.to_dense()
    assert type(linear) is nn.Linear
    assert torch.equal(linear(random(2, K)), layer(random(2, K)))


def test_dense_layer_takes_a_dtype() -> None:
    assert quantized().to_dense(torch.float16).weight.dtype == torch.float16


class Conv1D(nn.Module):
    """A layer by the name and form of transformers': weight [K, N]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def conv() -> Conv1D:
    layer = Conv1D(N, K)
    with torch.no_grad():
        layer.weight.copy_(random(N, K).t())
    return layer


def test_conv1d_is_seen_as_its_transpose(conv: Conv1D) -> None:
    seen = view_dense(conv)
    assert seen is not None
    assert torch.equal(seen.weight, random(N, K))


def test_conv1d_is_quantized_as_its_transpose(conv: Conv1D) -> None:
    layer = QuantizedLinear.from_linear(conv, TinyInt8())
    assert raw(layer) == raw(quantized())
    assert (layer.in_features, layer.out_features) == (K, N)


def test_conv1d_comes_back_as_conv1d(conv: Conv1D) -> None:
    layer = QuantizedLinear.from_linear(conv, TinyInt8())
    back = layer.to_dense()
    assert (type(back), tuple(back.weight.shape), back.weight.is_contiguous()) == (Conv1D, (K, N), True)
    torch.testing.assert_close(back(random(2, K)), layer(random(2, K)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_built_dense_layer_is_what_was_viewed(bias: bool) -> None:
    linear = dense(bias)
    seen = view_dense(linear)
    assert seen is not None
    rebuilt = build_dense(seen.kind, seen.weight, seen.bias)
    assert torch.equal(rebuilt(random(2, K)), linear(random(2, K)))


# Exchange in a model


def test_replace_puts_a_module_at_a_dotted_name() -> None:
    model, layer = nn.Sequential(nn.Sequential(nn.Identity())), quantized()
    replace_module(model, "0.0", layer)
    assert model[0][0] is layer  # type: ignore[index]


def test_quantized_modules_are_found_by_name() -> None:
    model = nn.Sequential(quantized(), nn.Sequential(nn.Identity(), quantized()))
    assert [name for name, _ in quantized_modules(model)] == ["0", "1.1"]


@pytest.fixture
def model(tiny: None, build_model: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    return quantcore.quantize(build_model(), "tiny-int8")  # type: ignore[return-value]


def test_quantized_layer_keeps_the_training_flag(tiny: None, build_model: Callable[[], nn.Module]) -> None:
    assert quantcore.quantize(build_model().eval(), "tiny-int8").first.training is False  # type: ignore[union-attr]


def test_model_deep_copies(model: nn.Module) -> None:
    assert torch.equal(copy.deepcopy(model)(random(2, 16)), model(random(2, 16)))


def test_model_moves_to_half_but_for_its_packed_weights(model: nn.Module) -> None:
    before = raw(model.first)  # type: ignore[arg-type]
    assert model.half()(random(2, 16, dtype=torch.float16)).dtype == torch.float16
    assert raw(model.first) == before  # type: ignore[arg-type]


class Falcon(nn.Linear):
    """As Falcon's: the same product, spelled out."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Noisy(nn.Linear):
    """The same product, but in training."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return nn.functional.dropout(y, training=self.training)


class Settings(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.alpha = 1.0


class Broken(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("needs more than an input")


def test_subclass_that_computes_the_same_is_quantized_and_comes_back() -> None:
    linear, x = Falcon(K, N), random(2, K)
    layer = QuantizedLinear.from_linear(linear, TinyInt8())
    back = layer.to_dense()
    assert type(back) is Falcon
    torch.testing.assert_close(back(x), layer(x))


@pytest.mark.parametrize("kind", [Doubled, Noisy, Settings, Broken, nn.modules.linear.NonDynamicallyQuantizableLinear])
def test_subclass_that_computes_something_else_is_no_linear_layer(kind: type[nn.Linear]) -> None:
    with pytest.raises(TypeError, match=f"got {kind.__name__}"):
        QuantizedLinear.from_linear(kind(K, N), TinyInt8())
