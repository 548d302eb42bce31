"""BitNet over float weights: the bundled model learns with ternary weights, and is saved with those it learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore
from quantcore.integrations.transformers import load_tokenizer
from quantcore.nn.online import OnlineLinear

MODEL = Path(__file__).parent.parent / "examples" / "stdlib-lm"
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
STEPS = 24


def batches() -> Tensor:
    text = (MODEL / "calibration.txt").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(MODEL)(text[:20_000])["input_ids"])
    return ids[: 8 * 2 * 64].view(8, 2, 64)


def train(model: nn.Module, data: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(STEPS):
        loss = model(data[step % len(data)], labels=data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_loss_falls_and_what_was_learned_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantcore.quantize(quantcore.load(MODEL, dtype="float32"), ONLINE)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is OnlineLinear
    before = layer.weight.detach().clone()
    losses = train(model, batches())
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert not torch.equal(layer.weight, before)
    quantcore.save(model, tmp_path / "learned")
    stored = load_file(tmp_path / "learned" / "model.safetensors")
    assert torch.equal(stored["model.layers.0.self_attn.q_proj.weight"], layer.weight)
    again, ids = quantcore.load(tmp_path / "learned"), batches()[0]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_gradients_pass_through_the_rounding() -> None:
    linear = nn.Linear(32, 16)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    x = torch.randn(5, 32, requires_grad=True)
    layer = quantcore.quantize(nn.Sequential(nn.Linear(1, 1), linear), {**ONLINE, "modules_to_not_convert": ["0"]})[1]
    layer(x).square().sum().backward()
    scale = weight.abs().mean().clamp(min=1e-5)
    ternary = (weight / scale).round().clamp(-1, 1) * scale
    step = x.detach().abs().amax(1, keepdim=True) / 127
    rounded = (x.detach() / step).round() * step
    slope = 2 * (rounded @ ternary.t() + bias)
    torch.testing.assert_close(x.grad, slope @ ternary, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, slope.t() @ rounded, rtol=1e-4, atol=1e-4)
