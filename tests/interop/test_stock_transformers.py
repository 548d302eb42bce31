"""transformers with bitsandbytes beside quantcore: neither changes the other. Needs both; run by name only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from quantcore.integrations.transformers import disable, enable, use
from quantcore.nn.replace import quantized_modules

Make = Callable[[str], Any]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
IDS = torch.arange(12).view(2, 6) * 7 % 90
FAMILIES = ["llama", "llama-tied", "qwen3", "gemma", "gpt2", "opt", "bert"]


def logits(model: Any) -> Tensor:
    """In training mode: there bitsandbytes dequantizes to the compute dtype, as quantcore does."""
    with torch.no_grad():
        found = model.train()(IDS).logits
    assert isinstance(found, Tensor)
    return found


def load(folder: Path, like: Any, **options: Any) -> Any:
    return type(like).from_pretrained(folder, device_map="cpu", **options)


def is_stock(model: Any) -> bool:
    return any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


@pytest.fixture
def float_folder(make_model: Make, tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_stock_loading_is_the_same_after_quantcore_served(float_folder: Path, make_model: Make) -> None:
    like, config = make_model("llama"), BitsAndBytesConfig(**NF4)
    before = load(float_folder, like, quantization_config=config)
    with use():
        served = load(float_folder, like, quantization_config=config)
    enable()
    disable()
    after = load(float_folder, like, quantization_config=config)
    assert is_stock(before)
    assert is_stock(after)
    assert not is_stock(served)
    found, expected = after.state_dict(), before.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(after), logits(before))


def test_method_that_is_left_out_stays_with_transformers(float_folder: Path, make_model: Make) -> None:
    with use(without=["bitsandbytes"]):
        model = load(float_folder, make_model("llama"), quantization_config=BitsAndBytesConfig(**NF4))
        hqq = load(float_folder, make_model("llama"), quantization_config={"quant_method": "hqq", "nbits": 4})
    assert is_stock(model)
    assert len(list(quantized_modules(hqq))) == 14


def assert_same_when_dequantized(stock: Any, served: Any) -> None:
    """bitsandbytes gives back nn.Linear for every layer, Conv1D too, so what the models compute is compared."""
    with torch.no_grad():
        found = stock.dequantize(torch.float32).eval()(IDS).logits.double()
        expected = served.dequantize(torch.float32).eval()(IDS).logits.double()
    assert float((found - expected).norm() / expected.norm()) <= 1e-5  # accumulation order in float32


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_while_served_loads_in_stock(family: str, make_model: Make, tmp_path: Path) -> None:
    like = make_model(family)
    like.save_pretrained(tmp_path / "float")
    with use():
        served = load(tmp_path / "float", like, quantization_config=BitsAndBytesConfig(**NF4))
    served.save_pretrained(tmp_path / "served")
    stock = load(tmp_path / "served", like)
    assert is_stock(stock)
    assert_same_when_dequantized(stock, served)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stock_saves_is_served(family: str, make_model: Make, tmp_path: Path) -> None:
    like = make_model(family)
    like.save_pretrained(tmp_path / "float")
    stock = load(tmp_path / "float", like, quantization_config=BitsAndBytesConfig(**NF4))
    stock.save_pretrained(tmp_path / "stock")
    with use():
        served = load(tmp_path / "stock", like)
    assert not is_stock(served)
    assert_same_when_dequantized(stock, served)
