"""Theme state: the state dict of a quantized layer, casts and moves, and layers made of stored tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, same_bytes
from quantcore.testing.damage import SURPLUS, damage_each, misshape, recast, required_names
from quantcore.testing.subjects import LAYER_NAME, REGULAR_SHAPE, Example, make_linear, normal

N, K = REGULAR_SHAPE
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "to_dtype": lambda module: module.to(torch.float16),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float64),
}


def test_state_dict_has_the_names_of_the_specs(example: Example, dtype: torch.dtype) -> None:
    layer = example.layer(make_linear(dtype=dtype))
    names = [spec.name for spec in layer.format.tensor_specs(REGULAR_SHAPE)]
    assert sorted(layer.state_dict()) == sorted([*names, "bias"])


@pytest.mark.side_by_side
def test_state_dict_holds_what_was_quantized(example: Example, dtype: torch.dtype) -> None:
    linear = make_linear(dtype=dtype)
    expected = {**example.quantize(linear).tensors, "bias": linear.bias.detach()}
    assert differences(example.layer(linear).state_dict(), expected) == []


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_cast_leaves_stored_bytes_alone(example: Example, cast: Callable[[nn.Module], nn.Module]) -> None:
    layer = example.layer(make_linear())
    expected = example.layer(make_linear())
    cast(layer)
    assert differences(layer.stored, expected.stored) == []
    assert same_bytes(layer.dequantize(torch.float32), expected.dequantize(torch.float32))


def test_cast_of_a_model_reaches_the_bias(example: Example) -> None:
    layer = example.layer(make_linear()).to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16


def test_layer_on_meta_keeps_names_dtypes_and_shapes(example: Example) -> None:
    layer = example.layer(make_linear())
    expected = {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items()}
    found = layer.to("meta").state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == expected
    assert {tensor.device.type for tensor in found.values()} == {"meta"}


def test_emptied_layer_takes_a_state_dict(example: Example) -> None:
    layer = example.layer(make_linear())
    expected = example.layer(make_linear())
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(expected.state_dict())
    assert same_bytes(layer(_input()), expected(_input()))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_layer_on_meta_takes_a_state_dict(example: Example, assign: bool) -> None:
    layer = example.layer(make_linear()).to("meta")
    expected = example.layer(make_linear())
    layer.load_state_dict(expected.state_dict(), assign=assign)
    assert differences(layer.state_dict(), expected.state_dict()) == []
    assert same_bytes(layer(_input()), expected(_input()))


def test_layer_of_other_values_takes_a_state_dict(example: Example, dtype: torch.dtype, device: torch.device) -> None:
    expected = example.layer(make_linear(dtype=dtype, device=device))
    layer = example.layer(make_linear(dtype=dtype, device=device, seed=7))
    x = _input().to(device, dtype)
    assert not same_bytes(layer(x), expected(x))
    layer.load_state_dict(expected.state_dict())
    assert differences(layer.state_dict(), expected.state_dict()) == []
    assert same_bytes(layer(x), expected(x))


def test_state_dict_survives_a_change_of_the_layer(example: Example) -> None:
    layer = example.layer(make_linear())
    other = example.layer(make_linear(seed=7))
    layer.load_state_dict(other.state_dict())
    for tensor in layer.stored.values():
        tensor.data.zero_()
    assert differences(other.state_dict(), example.layer(make_linear(seed=7)).state_dict()) == []


def test_missing_tensor_is_named_by_load_state_dict(example: Example) -> None:
    model = nn.Sequential(example.layer(make_linear()))
    for name in list(model.state_dict()):
        state = model.state_dict()
        del state[name]
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        assert name in str(caught.value)


def test_surplus_tensor_is_named_by_load_state_dict(example: Example) -> None:
    model = nn.Sequential(example.layer(make_linear()))
    state = {**model.state_dict(), f"0.{SURPLUS}": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=SURPLUS):
        model.load_state_dict(state)


@pytest.mark.parametrize("damage", [misshape, recast], ids=["wrong_shape", "wrong_dtype"])
def test_misfitting_tensor_is_named_by_load_state_dict(example: Example, damage: Callable[[Tensor], Tensor]) -> None:
    layer = example.layer(make_linear())
    for name in layer.stored:
        state = {**layer.state_dict(), name: damage(layer.stored[name])}
        with pytest.raises(RuntimeError) as caught:
            layer.load_state_dict(state)
        assert name in str(caught.value)


def test_refused_state_dict_leaves_the_stored_tensors_as_they_were(example: Example) -> None:
    layer = example.layer(make_linear())
    state = {**example.layer(make_linear(seed=7)).state_dict(), SURPLUS: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=SURPLUS):
        layer.load_state_dict(state)
    assert differences(layer.stored, example.layer(make_linear()).stored) == []


@pytest.mark.parametrize("described_by", ["config", "format"])
def test_layer_of_stored_tensors_is_equal(example: Example, dtype: torch.dtype, described_by: str) -> None:
    linear = make_linear(dtype=dtype)
    expected = example.layer(linear)
    source = dict(example.config_dict) if described_by == "config" else example.weight_format(linear)
    layer = QuantizedLinear.from_tensors(source, expected.state_dict(), in_features=K, out_features=N, name=LAYER_NAME)
    x = _input().to(dtype)
    assert differences(layer.state_dict(), expected.state_dict()) == []
    assert same_bytes(layer(x), expected(x))


def test_all_misfitting_tensors_are_in_one_error(example: Example) -> None:
    linear = make_linear()
    layer = example.layer(linear)
    for missing in required_names(layer):
        tensors, damaged = damage_each(layer, missing)
        with pytest.raises(CheckpointError) as caught:
            QuantizedLinear.from_tensors(
                example.weight_format(linear), tensors, in_features=K, out_features=N, name=LAYER_NAME
            )
        assert [name for name in [LAYER_NAME, *damaged] if name not in str(caught.value)] == []


def test_tensors_of_another_shape_are_refused(example: Example) -> None:
    linear = make_linear()
    stored = example.layer(linear).stored
    with pytest.raises(CheckpointError, match=LAYER_NAME):
        QuantizedLinear.from_tensors(
            example.weight_format(linear), stored, in_features=2 * K, out_features=N, name=LAYER_NAME
        )


def _input() -> Tensor:
    return normal((5, K), seed=3)
