"""A low-rank adapter of two matrices, made by hand, trains over a quantized model as over the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.integrations.transformers import load_tokenizer
from quantcore.nn.replace import quantized_modules, replace_module

MODEL = Path(__file__).parent.parent / "examples" / "stdlib-lm"
STEPS = 50
NF4_DOUBLE = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


class Adapted(nn.Module):
    """base(x) + x A^T B^T, of which A and B are trained (LoRA, arXiv:2106.09685)."""

    def __init__(self, base: Any, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        added = x.float() @ self.down.t() @ self.up.t()
        return self.base(x) + added.to(x.dtype)  # type: ignore[no-any-return]


def adapt(model: nn.Module) -> nn.Module:
    """The model with an adapter on every linear layer of its blocks, which alone can be trained."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if name.endswith("_proj")]:
        replace_module(model, name, Adapted(model.get_submodule(name)))
    return model


def batches() -> list[Tensor]:
    text = (MODEL / "calibration.txt").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(MODEL)(text[:40_000])["input_ids"])
    return list(ids[: len(ids) // 256 * 256].view(-1, 2, 128))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    loss = model(batch, labels=batch).loss
    assert isinstance(loss, Tensor)
    return loss


def train(model: nn.Module, data: list[Tensor]) -> tuple[float, float]:
    """Mean loss of the held-out batch before and after STEPS steps, with an evaluation every ten."""
    *data, held_out = data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for step in range(STEPS + 1):
        if step % 10 == 0:
            with torch.no_grad():
                seen.append(loss_of(model.eval(), held_out).item())
        if step < STEPS:
            loss_of(model.train(), data[step % len(data)]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen[0], seen[-1]


@pytest.mark.slow
def test_loss_falls_as_it_does_over_the_bfloat16_base_and_no_stored_bit_changes() -> None:
    data = batches()
    quantized = quantcore.quantize(quantcore.load(MODEL), NF4_DOUBLE)
    stored = {id(t): t.clone() for _, m in quantized_modules(quantized) for t in m.stored.values()}
    before, after = train(adapt(quantized), data)
    reference_before, reference_after = train(adapt(quantcore.load(MODEL)), data)
    assert reference_after < 0.97 * reference_before
    assert after < 0.97 * before
    assert after == pytest.approx(reference_after, rel=0.05)
    current = [t for _, m in quantized_modules(quantized) for t in m.stored.values()]
    assert len(current) == len(stored) == 42 * 6
    assert all(torch.equal(tensor, stored[id(tensor)]) for tensor in current)
