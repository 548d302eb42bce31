"""Embeddings in 4 and 8 bits: golden tables and rows, and rows of every layout without the rest of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from quantcore.nn import QuantizedEmbedding
from quantcore.testing.compare import differences
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore.testing.subjects import normal
from quantcore_bnb.bitsandbytes.format import Bnb4Bit
from quantcore_bnb.bitsandbytes.format_int8 import Bnb8Bit

GOLDEN = golden_folder("bitsandbytes", Path(__file__).parents[3] / "tests" / "golden")
FORMATS = {
    "nf4": Bnb4Bit(),
    "nf4_double": Bnb4Bit(double_quant=True),
    "nf4_double_block_128": Bnb4Bit(double_quant=True, blocksize=128),
    "fp4_float16_storage": Bnb4Bit(quant_type="fp4", storage="float16"),
    "int8": Bnb8Bit(),
}


@pytest.fixture(params=sorted(GOLDEN.glob("embedding*.safetensors")), ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def stored_embedding(case: GoldenLayer) -> QuantizedEmbedding:
    rows, width = case.weight.shape
    return QuantizedEmbedding.from_tensors(
        case.config, case.stored, num_embeddings=rows, embedding_dim=width, dtype=case.weight.dtype
    )


def test_golden_set_has_both_widths() -> None:
    assert len(list(GOLDEN.glob("embedding*.safetensors"))) >= 2


def test_quantizing_gives_the_golden_bytes(case: GoldenLayer) -> None:
    embedding = nn.Embedding.from_pretrained(case.weight)
    stored = QuantizedEmbedding.from_embedding(embedding, case.config).stored
    stored.pop("weight_format", None)  # upstream's embedding, which cannot be saved, does not have it
    assert differences(stored, case.stored) == []


def test_stored_table_dequantizes_to_the_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(stored_embedding(case).dequantize(case.expected["weight"].dtype), case.expected["weight"])


def test_rows_are_upstreams(case: GoldenLayer) -> None:
    found, expected = stored_embedding(case)(case.expected["x"]), case.expected["y"]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # The case's own tolerance: upstream multiplies 8-bit codes in half precision.
    assert float((found - expected).float().norm() / expected.float().norm()) <= 1e-2


@pytest.mark.parametrize("shape", [(50, 128), (17, 64), (9, 80), (1, 256)], ids=str)
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS.keys())
def test_rows_are_those_of_the_whole_table(weight_format: Bnb4Bit | Bnb8Bit, shape: tuple[int, int]) -> None:
    embedding = nn.Embedding.from_pretrained(normal(shape))
    layer = QuantizedEmbedding.from_embedding(embedding, weight_format)
    ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(layer(ids), layer.dequantize(torch.float32)[ids])


def test_rows_do_not_read_the_rest_of_the_table() -> None:
    embedding = nn.Embedding.from_pretrained(normal((300, 128)))
    layer = QuantizedEmbedding.from_embedding(embedding, Bnb4Bit(double_quant=True))
    ids = torch.tensor([7, 299])
    expected = layer(ids)
    layer.stored["weight"].data.view(300, -1)[8:299] = 0
    layer.stored["weight.absmax"].data.view(300, -1)[8:299] = 0
    assert torch.equal(layer(ids), expected)
