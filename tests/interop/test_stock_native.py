"""What we save in methods that transformers reads without another package loads there, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import quantcore

Make = Callable[[str], Any]
IDS = torch.arange(12).view(2, 6) * 7 % 96
FP8: dict[str, dict[str, Any]] = {
    "blocks": {"quant_method": "fp8", "weight_block_size": [64, 32]},
    "tensor": {"quant_method": "fp8", "weight_block_size": None},
    "mxfp8": {"quant_method": "mxfp8", "weight_block_size": [1, 32]},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found.double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitnet(make_model: Make, dtype: torch.dtype, tmp_path: Path) -> None:
    config = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
    quantcore.save(quantcore.quantize(make_model("llama").to(dtype), config), tmp_path / "ours")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu", dtype=dtype))
    # Inputs are codes of 8 bits on both sides, products of theirs are summed in integers or floats.
    assert_close(found, logits(quantcore.load(tmp_path / "ours", dtype=dtype)), 2e-2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gemma(make_model: Make, bits: int, tmp_path: Path) -> None:
    config = {"quant_method": "gemma", "num_bits": bits}
    quantcore.save(quantcore.quantize(make_model("gemma2"), config), tmp_path / "ours")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu"))
    assert_close(found, logits(quantcore.load(tmp_path / "ours")), 1e-5)  # float32 sums in another order


@pytest.mark.parametrize("name", FP8)
def test_float8_that_is_dequantized(make_model: Make, name: str, tmp_path: Path) -> None:
    quantcore.save(quantcore.quantize(make_model("llama").to(torch.bfloat16), FP8[name]), tmp_path / "ours")
    as_floats = FineGrainedFP8Config(dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", quantization_config=as_floats, dtype=torch.bfloat16, device_map="cpu"
    )
    ours = quantcore.dequantize(quantcore.load(tmp_path / "ours"))
    found, expected = stock.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
