"""Blocks that llama.cpp wrote: read bit for bit, and chosen anew from the same weights, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantcore.nn import QuantizedEmbedding, QuantizedLinear
from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_misc.gguf.blocks import dequantize_rows
from quantcore_misc.gguf.families import family_of
from quantcore_misc.gguf.format import GgufWeight
from quantcore_misc.gguf.quantize import QUANTIZERS, quantize_rows
from quantcore_misc.gguf.types import BLOCK_TYPES

GOLDEN = golden_folder("gguf", Path(__file__).parents[3] / "tests" / "golden")
LAYERS = [file for file in sorted(GOLDEN.glob("*.safetensors")) if "layer.weight" in golden_facts(file)["tensors"]]
MADE = [file for file in LAYERS if golden_facts(file)["ggml_type_name"] in QUANTIZERS]
RANDOM = [
    pytest.param(file, name.removesuffix(".bytes"), id=name.removesuffix(".bytes"))
    for file in sorted(GOLDEN.glob("random-bytes-*.safetensors"))
    for name in golden_facts(file)["tensors"]
    if name.endswith(".bytes")
]


@pytest.mark.parametrize(("file", "kind"), RANDOM)
def test_random_bytes_are_read_bit_for_bit(file: Path, kind: str) -> None:
    stored = load_file(file)
    found, expected = dequantize_rows(stored[f"{kind}.bytes"], kind), stored[f"{kind}.expected"]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("file", LAYERS, ids=lambda file: file.stem)
def test_layer_is_read_bit_for_bit(file: Path) -> None:
    stored, kind = load_file(file), golden_facts(file)["ggml_type_name"]
    N, K = stored["input.weight"].shape
    config, tensors = {"quant_method": "gguf", "type": kind}, {"weight": stored["layer.weight"]}
    linear = QuantizedLinear.from_tensors(config, tensors, in_features=K, out_features=N)
    assert torch.equal(linear.dequantize(torch.float32), stored["expected.weight"])
    assert torch.equal(linear.state_dict()["weight"], stored["layer.weight"])
    table = QuantizedEmbedding.from_tensors(config, tensors, num_embeddings=N, embedding_dim=K)
    assert torch.equal(table(torch.tensor([3, 0])).float(), stored["expected.weight"][[3, 0]])


@pytest.mark.parametrize("file", MADE, ids=lambda file: file.stem)
def test_weights_are_quantized_byte_for_byte(file: Path) -> None:
    stored, kind = load_file(file), golden_facts(file)["ggml_type_name"]
    found = quantize_rows(stored["input.weight"], kind, stored.get("input.imatrix"))
    assert torch.equal(found, stored["layer.weight"])


def test_every_block_type_has_a_golden_case() -> None:
    cases = {param.values[1] for param in RANDOM} | {golden_facts(file)["ggml_type_name"] for file in LAYERS}
    assert BLOCK_TYPES.keys() - cases == {"Q1_0"}


def test_one_bit_is_the_sign() -> None:
    block = torch.cat(
        [torch.tensor([0.5]).half().view(torch.uint8), torch.tensor([0b101, *[0] * 15], dtype=torch.uint8)]
    )
    found = dequantize_rows(block[None], "Q1_0")[0]
    assert found[:4].tolist() == [0.5, -0.5, 0.5, -0.5]


def test_repacked_small_floats_are_read() -> None:
    stored = load_file(GOLDEN / "repack-from-hf.safetensors")
    assert torch.equal(dequantize_rows(stored["mxfp4.ggml"], "MXFP4").flatten(0, 1), stored["mxfp4.expected"])
    assert torch.equal(dequantize_rows(stored["nvfp4.ggml"], "NVFP4"), stored["nvfp4.expected_without_global"])


@pytest.mark.parametrize("kind", sorted(name for name in BLOCK_TYPES if family_of(name)))
def test_families_hold_the_numbers_and_give_the_bytes_back(kind: str) -> None:
    weight = 0.05 * torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    weight_format = GgufWeight(kind)
    stored = weight_format.quantize(weight)
    family = weight_format.lower(stored, (6, 512))
    assert torch.equal(family.dequantize(torch.float32), weight_format.dequantize(stored, (6, 512)))
    assert torch.equal(weight_format.raise_(family)["weight"], stored["weight"])


@pytest.mark.parametrize(
    ("kind", "other", "fault"),
    [
        ("Q4_K", "Q4_1", "no|scales"),
        ("Q8_0", "Q4_0", "8 bits does not fit"),
        ("Q4_1", "Q4_0", "zero points|offsets"),
        ("IQ4_NL", "Q4_0", "Lookup of 4 bits does not fit"),
        ("Q4_0", "Q4_K", "no groups|no integers|scales"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(kind: str, other: str, fault: str) -> None:
    weight = 0.05 * torch.randn(2, 512, generator=torch.Generator().manual_seed(4))
    stored = GgufWeight(kind).quantize(weight)
    with pytest.raises(ValueError, match=fault):
        GgufWeight(other).raise_(GgufWeight(kind).lower(stored, (2, 512)))


def test_scale_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for Q8_0, whose scales end at 65504"):
        quantize_rows(torch.full((1, 32), 1e9), "Q8_0")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "NVFP4"])
def test_pieces_of_a_weight_give_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 512, generator=torch.Generator().manual_seed(5))
    whole = quantize_rows(weight, kind, torch.rand(512, generator=torch.Generator().manual_seed(6)))
    values = dequantize_rows(whole, kind)
    for module in ("blocks", "quantize"):
        monkeypatch.setattr(f"quantcore_misc.gguf.{module}.PIECE", 1024)
    pieces = quantize_rows(weight, kind, torch.rand(512, generator=torch.Generator().manual_seed(6)))
    assert torch.equal(pieces, whole)
    assert torch.equal(dequantize_rows(whole, kind), values)


def test_types_that_are_only_read_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="type IQ2_XXS is read, not made"):
        quantize_rows(torch.ones(1, 256), "IQ2_XXS")
