"""What we save loads in stock transformers and bitsandbytes, and the other way round. Needs both; run by name only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quantcore
from quantcore_bnb.bitsandbytes.upstream import linear

FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": FOUR_BIT,
    "nf4-bf16-storage": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
}
IDS = torch.arange(12).view(2, 6) * 7 % 96


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, Tensor)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def stock(config: dict[str, Any]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**{key: value for key, value in config.items() if key != "quant_method"})


def portable(model: Any) -> Any:
    """Upstream's training path: weights dequantized to the compute dtype, then a matmul.

    In eval mode its CPU library may repack the weights and multiply in bfloat16, whatever the compute dtype.
    """
    return model.train()


@pytest.fixture
def ours(make_model: Callable[[str], Any], config: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of a small Llama that we quantized and saved."""
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def theirs(make_model: Callable[[str], Any], config: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of the same model that transformers and bitsandbytes quantized and saved."""
    make_model("llama").save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=stock(config), device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_stock_transformers_loads_what_we_save(ours: Path, config: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(ours, device_map="cpu")
    # float32: accumulation order alone. int8 in training is dequantized instead of multiplied as integers; the rounding
    # of activations to 8 bits is what differs, as between logits and logits_train_path of the golden checkpoint.
    tolerance = 5e-2 if "load_in_8bit" in config else 1e-5
    assert relative_error(logits(portable(model)), logits(quantcore.load(ours))) <= tolerance


def test_stock_transformers_dequantizes_what_we_save_to_our_weights(ours: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(ours, device_map="cpu").dequantize().state_dict()
    expected = quantcore.dequantize(quantcore.load(ours)).state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_we_load_what_stock_transformers_saves(theirs: Path, config: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(theirs, device_map="cpu")
    tolerance = 5e-2 if "load_in_8bit" in config else 1e-5
    assert relative_error(logits(quantcore.load(theirs)), logits(portable(model))) <= tolerance


def test_both_save_the_same_names_and_dtypes(ours: Path, theirs: Path) -> None:
    found, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }


def test_the_layer_that_bench_compares_with_is_bitsandbytes_own(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 64, bias=False)
    stock = linear(dense, quantcore.AutoQuantizationConfig.from_dict(config))
    ours = quantcore.nn.QuantizedLinear.from_linear(dense, config)
    x = torch.randn(5, 128)
    assert type(stock).__module__.startswith("bitsandbytes")
    assert relative_error(stock(x).float(), ours(x)) < 0.02  # int8 rounds its input too
