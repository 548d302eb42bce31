"""What the tests of adapters share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def train(model: Any, ids: Tensor, steps: int) -> list[float]:
    """The losses of some steps on a text, which the model's adapters learn by heart."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
