"""What we save loads in optimum-quanto and computes the same, and the other way round. Needs it; run by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.quanto import freeze, quantization_map, quantize
from optimum.quanto.models import QuantizedModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcore

Make = Callable[[str], Any]
WEIGHTS = ("int8", "int4", "int2", "float8")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # products are summed in another order, and rounded by step
IDS = torch.arange(12).view(2, 6) * 7 % 96
MAP = "quanto_qmap.json"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found.double()


def save_as_upstream(model: Any, folder: Path) -> None:
    """The files of optimum-quanto's own save, whose config lacks a method and whose map lists the layers."""
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MAP).write_text(json.dumps(quantization_map(model)))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_upstream_computes_what_we_compute(make_model: Make, weights: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = {"quant_method": "quanto", "weights": weights}
    model = make_model("llama").to(dtype)
    model.config.dtype = dtype  # in which upstream builds what it loads
    quantcore.save(quantcore.quantize(model, config), tmp_path / "ours")
    found = logits(QuantizedModelForCausalLM.from_pretrained(tmp_path / "ours"))
    expected = logits(quantcore.load(tmp_path / "ours"))
    assert (found - expected).norm() <= TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_we_compute_what_upstream_computes(make_model: Make, weights: str, tmp_path: Path) -> None:
    stock = make_model("llama")
    quantize(stock, weights=f"q{weights}")
    freeze(stock)
    save_as_upstream(stock, tmp_path)
    ours = quantcore.load(tmp_path)
    assert (logits(ours) - logits(stock)).norm() <= TOLERANCES[torch.float32] * logits(stock).norm()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_we_quantize_has_upstreams_bytes(make_model: Make, weights: str, tmp_path: Path) -> None:
    stock = make_model("llama")
    quantize(stock, weights=f"q{weights}", exclude="lm_head")
    freeze(stock)
    config = {"quant_method": "quanto", "weights": weights}
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "ours")
    found, expected = load_file(tmp_path / "ours/model.safetensors"), stock.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].flatten(), expected[name].flatten()) for name in expected)
