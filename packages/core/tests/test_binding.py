"""Formats that learn from values which are too large to be read with the headers of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.formats.base import TensorSpec, WeightFormat
from quantcore.nn import QuantizedLinear


@dataclass(frozen=True)
class Reordered(WeightFormat):
    """A float weight whose columns are stored in some order; in_order says that it is the usual one."""

    in_order: bool = False

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        order = TensorSpec("order", torch.int64, (shape[1],), metadata=self.in_order)
        return (TensorSpec("values", torch.float32, shape), order)

    def read(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> WeightFormat:
        order = tensors["order"]
        if order.is_meta:
            return self
        if not torch.equal(order.sort().values, torch.arange(shape[1])):
            raise ValueError("order: is no order of the columns")
        return self.replace(in_order=torch.equal(order, torch.arange(shape[1])))

    def dequantize(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> Tensor:
        values = tensors["values"] if self.in_order else tensors["values"][:, tensors["order"]]
        return values.to(dtype or torch.float32)


VALUES = torch.arange(6.0).view(2, 3)


def filled(order: list[int]) -> QuantizedLinear:
    """A layer that was built on meta, with its tensors put in place one by one."""
    tensors = {"values": VALUES, "order": torch.tensor(order)}
    empty = {name: tensor.to("meta") for name, tensor in tensors.items()}
    layer = QuantizedLinear.from_tensors(Reordered(), empty, in_features=3, out_features=2, name="layer")
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return layer


@pytest.mark.parametrize(("order", "in_order"), [([0, 1, 2], True), ([2, 0, 1], False)])
def test_format_is_read_anew_when_the_values_are_there(order: list[int], in_order: bool) -> None:
    layer = filled(order)
    layer.bind()
    assert layer.format == Reordered(in_order)
    assert len(layer.operands) == 2 - in_order
    assert torch.equal(layer(torch.eye(3)), VALUES[:, order].t())


def test_values_that_contradict_the_format_name_the_layer() -> None:
    layer = filled([0, 0, 1])
    with pytest.raises(CheckpointError, match="layer: order: is no order of the columns"):
        layer.bind()
