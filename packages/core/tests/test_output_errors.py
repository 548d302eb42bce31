"""The error of each quantized layer on the inputs that the float model gives it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantcore.evaluation.outputs import output_errors
from quantcore.nn import QuantizedLinear
from quantcore.nn.replace import replace_module


class Reader(nn.Module):
    """Two layers over an embedding, one of them in a branch that no token takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 32)
        self.first, self.second, self.unused = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.embed(ids))))


@pytest.fixture
def models(tiny: None) -> tuple[nn.Module, Reader]:
    model, reference = Reader(), Reader()
    for name in ("first", "second", "unused"):
        layer = QuantizedLinear.from_linear(getattr(reference, name), {"quant_method": "tiny-int8"}, name=name)
        replace_module(model, name, layer)
    return model, reference


def test_layers_are_compared_on_the_inputs_of_the_reference(models: tuple[nn.Module, Reader]) -> None:
    model, reference = models
    ids = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        x = reference.embed(ids)
        hidden = torch.relu(reference.first(x))
        expected = {}
        for name, inputs in (("first", x), ("second", hidden)):
            y, other = getattr(reference, name)(inputs), model.get_submodule(name)(inputs)
            expected[name] = float((y - other).norm() / y.norm())
    assert output_errors(model, reference, ids) == pytest.approx(expected, rel=1e-5)  # float32 norms
    assert all(0 < error < 0.05 for error in expected.values())


def test_hooks_are_gone_afterwards_and_after_a_failure(
    models: tuple[nn.Module, Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reference = models
    output_errors(model, reference, torch.arange(4)[None])

    def fail(self: Reader, ids: Tensor) -> Tensor:
        raise ValueError("no more memory")

    monkeypatch.setattr(Reader, "forward", fail)
    with pytest.raises(ValueError, match="no more memory"):
        output_errors(model, reference, torch.arange(4)[None])
    assert not any(module._forward_hooks for module in reference.modules())


def test_layer_that_the_reference_lacks_is_left_out(models: tuple[nn.Module, Reader]) -> None:
    model, reference = models
    model.add_module("extra", model.get_submodule("first"))
    assert set(output_errors(model, reference, torch.arange(4)[None])) == {"first", "second"}
