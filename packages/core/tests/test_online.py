"""Float master weights that are quantized in each forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_int8 import TinyInt8
from torch import Tensor, nn
from torch.nn.functional import linear as dense_linear
from turned_int8 import TurnedInt8

from quantcore.formats.base import WeightFormat
from quantcore.formats.transforms import BlockMatrix, Hadamard
from quantcore.nn import OnlineLinear, QuantizedLinear

N, K = 6, 8
FORMATS = pytest.mark.parametrize("weight_format", [TinyInt8(), TurnedInt8(transform=Hadamard())], ids=str)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def online(weight_format: WeightFormat, dtype: torch.dtype = torch.float32) -> OnlineLinear:
    linear = nn.Linear(K, N, dtype=dtype)
    linear.weight.data = random(N, K).to(dtype)
    return OnlineLinear(linear, weight_format)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_is_that_of_the_quantized_layer(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    layer = online(weight_format, dtype)
    x = random(3, K).to(dtype)
    assert torch.equal(layer(x), QuantizedLinear.from_linear(layer.to_linear(), weight_format)(x))


@FORMATS
def test_gradients_are_straight_through(weight_format: WeightFormat) -> None:
    layer, x = online(weight_format), random(2, 3, K).requires_grad_()
    grad = random(2, 3, N)
    layer(x).backward(grad)
    weight = QuantizedLinear.from_linear(layer.to_linear(), weight_format).dequantize()
    torch.testing.assert_close(x.grad, grad @ weight)
    torch.testing.assert_close(layer.weight.grad, grad.flatten(0, 1).t() @ x.detach().flatten(0, 1))
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


@FORMATS
def test_weight_is_trained_and_quantized_anew(weight_format: WeightFormat) -> None:
    layer, x = online(weight_format), random(16, K)
    wanted = dense_linear(x, -random(N, K))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    first = (layer(x) - wanted).square().mean()
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    assert (layer(x) - wanted).square().mean() < 0.05 * first


@FORMATS
def test_master_weight_is_what_is_saved(weight_format: WeightFormat) -> None:
    layer = online(weight_format)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(copy.deepcopy(layer)(random(3, K)), layer(random(3, K)))


def test_rotation_that_is_stored_beside_the_weight_is_used() -> None:
    weight_format = TurnedInt8(transform=BlockMatrix(matrix="rotation.matrix", size=4, start="identity"))
    matrix = torch.linalg.qr(random(4, 4))[0]
    plain = online(weight_format)
    layer = OnlineLinear(plain.to_linear(), weight_format, {"rotation.matrix": matrix})
    assert torch.equal(layer.quantize()["rotation.matrix"], matrix)
    stored = weight_format.quantize_transformed(plain.weight.detach(), {"rotation.matrix": matrix})
    assert torch.equal(layer.quantize()["weight"], stored["weight"])
    assert list(layer.state_dict()) == ["weight", "bias", "rotation_matrix"]
    torch.testing.assert_close(layer(random(3, K)), plain(random(3, K)), rtol=0.05, atol=0.05)
