"""LLM.int8 over float weights: rounded in each forward, trained, and saved as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantcore
from quantcore.nn import QuantizedLinear
from quantcore_bnb.bitsandbytes.trained import Int8TrainedLinear

CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 24, bias=False))


def inputs(rows: int = 6) -> torch.Tensor:
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 9  # an outlier column
    return x


def test_layers_multiply_as_8_bit_ones_over_their_own_parameters() -> None:
    model = build()
    weight = model[0].weight
    quantcore.quantize(model, CONFIG)
    assert type(model[0]) is Int8TrainedLinear
    assert model[0].weight is weight
    expected = QuantizedLinear.from_linear(build()[0], {**CONFIG, "llm_int8_has_fp16_weight": False})
    assert torch.equal(model[0](inputs()), expected(inputs()))


def test_gradients_are_those_of_the_rounded_weight_and_of_the_float_product() -> None:
    model = quantcore.quantize(build(), CONFIG)
    x = inputs().view(2, 3, 48).requires_grad_()
    grad = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    model[0](x).backward(grad)
    layer = QuantizedLinear.from_linear(build()[0], {**CONFIG, "llm_int8_has_fp16_weight": False})
    assert torch.equal(x.grad, grad @ layer.dequantize(torch.float32))
    torch.testing.assert_close(model[0].weight.grad, torch.einsum("abn,abk->nk", grad, x.detach()))
    torch.testing.assert_close(model[0].bias.grad, grad.sum((0, 1)))


def test_training_lowers_the_loss_and_moves_the_weights() -> None:
    model = quantcore.quantize(build(), CONFIG)
    target = torch.randn(32, 24, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(inputs(32)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_saved_weights_are_the_float_ones_and_load_as_such(tmp_path: Path) -> None:
    model = quantcore.quantize(build(), CONFIG)
    quantcore.save(model, tmp_path / "out")
    loaded = quantcore.load(tmp_path / "out", build)
    assert type(loaded[0]) is Int8TrainedLinear
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in build().state_dict().items())
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_dequantized_model_has_plain_layers_over_the_same_weights() -> None:
    model = quantcore.quantize(build(), CONFIG)
    weight = model[0].weight
    quantcore.dequantize(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    assert torch.equal(model(inputs()), build()(inputs()))


def test_weight_beyond_half_precision_is_an_error_naming_the_row() -> None:
    model = quantcore.quantize(build(), CONFIG)
    model[0].weight.data[3, 0] = 1e5
    with pytest.raises(ValueError, match="row 3 holds a magnitude above 65504"):
        model(inputs())
