"""Embeddings in the tensors of GPTQ."""

from __future__ import annotations

import pytest
import torch

from quantcore.nn import QuantizedEmbedding
from quantcore.testing.compare import differences
from quantcore_gptq.gptq.format import Gptq

ROWS, COLUMNS = 75, 40  # short last group and words


@pytest.mark.parametrize("g_idx", ["runs", "any"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_those_of_the_transposed_linear_weight(bits: int, g_idx: str) -> None:
    linear = Gptq(bits=bits, group_size=32, sym=False, g_idx=g_idx)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    tensors = linear.quantize(weight.t())
    if g_idx == "any":
        tensors["g_idx"] = tensors["g_idx"].flip(0)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False}
    table = QuantizedEmbedding.from_tensors(config, tensors, num_embeddings=ROWS, embedding_dim=COLUMNS)
    expected = linear.dequantize(linear.operands(tensors, (COLUMNS, ROWS)), (COLUMNS, ROWS)).t()
    ids = torch.tensor([[0, 74, 31], [32, 64, 5]])
    assert torch.equal(table(ids), expected[ids])
    assert torch.equal(table.dequantize(), expected)
    assert differences(table.state_dict(), tensors) == []


def test_shape_is_that_of_the_tensors_and_other_rows_are_refused() -> None:
    tensors = Gptq(group_size=32).quantize(torch.randn(COLUMNS, ROWS))
    table = QuantizedEmbedding.from_tensors(
        {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors, num_embeddings=ROWS, embedding_dim=COLUMNS
    )
    assert table.format.stored_shape(tensors) == (ROWS, COLUMNS)
    for row in (-1, ROWS):
        with pytest.raises(IndexError, match=f"none of {ROWS}"):
            table(torch.tensor([row]))
