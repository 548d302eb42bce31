"""Rows of HQQ weights: every width and axis, read without the rest of the weight where groups lie within rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantcore.nn import QuantizedEmbedding
from quantcore.testing.subjects import normal
from quantcore_hqq.hqq.format import Hqq

BITS = (8, 6, 5, 4, 3, 2, 1.58, 1)


def make_layer(weight_format: Hqq, shape: tuple[int, int]) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(normal(shape)), weight_format)


@pytest.mark.parametrize("shape", [(40, 128), (24, 64), (32, 80)], ids=str)
@pytest.mark.parametrize("group_size", [16, 64, None])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_those_of_the_whole_weight(
    bits: float, axis: int, group_size: int | None, shape: tuple[int, int]
) -> None:
    layer = make_layer(Hqq(bits=bits, group_size=group_size, axis=axis, compute_dtype="float32", optimize=False), shape)
    ids = torch.tensor([shape[0] - 1, 0, 7, 7])
    assert torch.equal(layer(ids), layer.dequantize()[ids])


@pytest.mark.parametrize(
    "weight_format",
    [Hqq(channel_wise=False), Hqq(view_as_float=True, compute_dtype="bfloat16")],
    ids=["one_range", "view_as_float"],
)
def test_rows_of_other_layouts_are_those_of_the_whole_weight(weight_format: Hqq) -> None:
    layer = make_layer(weight_format, (32, 128))
    ids = torch.tensor([[31, 0], [5, 5]])
    assert torch.equal(layer(ids), layer.dequantize()[ids])


def test_rows_do_not_read_the_rest_of_the_weight() -> None:
    layer = make_layer(Hqq(bits=8, compute_dtype="float32"), (300, 128))
    ids = torch.tensor([7, 299])
    expected = layer(ids)
    for tensor in (layer.stored["W_q"], layer.stored["scale"]):
        tensor.data.view(300, -1)[8:299] = 0
    assert torch.equal(layer(ids), expected)
