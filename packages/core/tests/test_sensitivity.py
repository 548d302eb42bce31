"""The divergence that is foreseen from curvature, beside the divergence that there is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from quantcore.workflows.sensitivity import record_curvature


class TinyLanguageModel(nn.Module):
    """An embedding, a layer, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.tanh(self.layer(self.table(input_ids)))))


IDS = torch.randint(50, (64, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["layer", "head"])
def test_divergence_of_a_small_change_is_foreseen(name: str) -> None:
    model = TinyLanguageModel()
    curvature = record_curvature(model, ["layer", "head"], [{"input_ids": IDS}])[name]
    before = model(IDS).logits.log_softmax(-1)
    module = model.get_submodule(name)
    change = 0.01 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        module.weight += change
        after = model(IDS).logits.log_softmax(-1)
    found = float((before.exp() * (before - after)).sum(-1).mean())
    # The factors are taken as independent, and the labels are one draw of many.
    assert curvature.divergence(change) == pytest.approx(found, rel=0.35)


def test_layer_that_is_not_run_is_left_out_and_parameters_keep_no_gradient() -> None:
    model = TinyLanguageModel()
    assert set(record_curvature(model, ["layer", "absent"], [{"input_ids": IDS[:2]}])) == {"layer"}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_without_logits_is_refused() -> None:
    model = TinyLanguageModel()
    model.forward = lambda input_ids: SimpleNamespace()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="TinyLanguageModel gives no logits"):
        record_curvature(model, ["layer"], [{"input_ids": IDS[:2]}])
