"""Experts of a 3-D weight whose format says how one of them is multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.nn.stack import QuantizedStack


@dataclass(frozen=True)
class Doubled(WeightFormat):
    """A float weight, whose layer doubles its input."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight", torch.float32, tuple(shape)),)

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        return tensors["weight"].to(dtype or torch.float32)

    def linear(self, x: Tensor, operands: Mapping[str, Tensor], bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert operands["weight"].shape == shape
        return torch.nn.functional.linear(2 * x, operands["weight"])


@dataclass(frozen=True)
class Transposed(Doubled):
    """A stack [E, K, N] of such weights."""

    def expert(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], index: int, transposed: bool
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        assert transposed
        return Doubled(), {"weight": tensors["weight"][index].t()}


def test_expert_is_multiplied_by_its_own_format() -> None:
    weight, x = torch.randn(3, 4, 5), torch.randn(2, 4)
    stack = QuantizedStack(Transposed(), {"weight": weight}, (3, 4, 5), "gate_up_proj")
    assert torch.allclose(stack.run(1, x, transposed=True), 2 * x @ weight[1])


def test_expert_of_another_format_is_dequantized() -> None:
    weight, x = torch.randn(3, 4, 5), torch.randn(2, 4)
    stack = QuantizedStack(Doubled(), {"weight": weight}, (3, 4, 5), "gate_up_proj")
    assert torch.allclose(stack.run(1, x, transposed=True), x @ weight[1])
