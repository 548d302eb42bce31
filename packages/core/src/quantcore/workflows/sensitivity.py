"""How much a model's predictions change when the weight of a layer does: curvature from one pass over a text.

The divergence of two models that are near each other is half the Fisher information in the direction of their
difference (Kullback 1959, section 2.6). That of a layer is taken as the product of two factors, of its inputs and of
the gradients at its outputs (Martens and Grosse 2015, arXiv:1503.05671, section 3), the second of them diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_WIDEST = 2048  # inputs of which all products are kept; of wider layers the squares alone


@dataclass
class Curvature:
    """Sums over tokens. inputs: of x x^T, [K, K], or of x^2, [K]. gains: of the squared gradients at outputs, [N]."""

    inputs: Tensor
    gains: Tensor
    tokens: int = 0

    def divergence(self, difference: Tensor) -> float:
        """About the KL divergence, nats a token, that a difference [N, K] of the weight makes."""
        change = difference.float()
        rows = change.square() @ self.inputs if self.inputs.ndim == 1 else ((change @ self.inputs) * change).sum(1)
        return float((rows.double() * self.gains.double()).sum()) / (2 * max(1, self.tokens) ** 2)


def record_curvature(
    model: nn.Module, names: Iterable[str], passes: Iterable[Mapping[str, Any]]
) -> dict[str, Curvature]:
    """The curvature of the named linear layers of a language model, on what it predicts itself for the passes.

    The gradients are of the log-likelihood of tokens that are drawn from the model's own predictions, with a fixed
    seed. Layers that are not run are left out. The model's parameters are left without gradients.
    Raises ValueError for a model without input embeddings or logits.
    """
    modules, found = dict(model.named_modules()), dict[str, Curvature]()
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(table, nn.Module):
        raise ValueError(f"{type(model).__name__} has no input embeddings, at which gradients could end")
    handles = [table.register_forward_hook(lambda module, inputs, output: output.requires_grad_())]
    for name in names:
        if name in modules:
            handles.append(modules[name].register_forward_hook(partial(_keep, found, name)))
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        for inputs in passes:
            logits = getattr(model(**inputs), "logits", None)
            if not isinstance(logits, Tensor):
                raise ValueError(f"{type(model).__name__} gives no logits; bits are chosen by weights without a text")
            flat = logits.flatten(0, -2).float()
            labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).flatten()
            nn.functional.cross_entropy(flat, labels.to(flat.device), reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keep(
    found: dict[str, Curvature], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    x = inputs[0].detach().flatten(0, -2).float()
    is_wide = x.shape[1] > _WIDEST
    if name not in found:
        shape = (x.shape[1],) if is_wide else (x.shape[1], x.shape[1])
        found[name] = Curvature(x.new_zeros(shape), x.new_zeros(output.shape[-1]))
    curvature = found[name]
    curvature.inputs += x.square().sum(0) if is_wide else x.t() @ x
    curvature.tokens += x.shape[0]
    if output.requires_grad:
        output.register_hook(lambda gradient: _add(curvature, gradient))


def _add(curvature: Curvature, gradient: Tensor) -> None:
    curvature.gains += gradient.detach().flatten(0, -2).float().square().sum(0)
