"""Methods that calibrate, through transformers: with the data that the config names, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore.integrations.transformers import use
from quantcore.nn.replace import quantized_modules

TEXTS = [" ".join(str(number * step) for number in range(200)) for step in range(1, 12)]
NEED_DATA: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 32},
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "ct-solver": {
        "quant_method": "compressed-tensors",
        "solver": "gptq",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
}


def tokenize(text: str, **options: Any) -> dict[str, list[int]]:
    """A tokenizer: bytes, each an id."""
    return {"input_ids": [byte % 96 for byte in text.encode()]}


@pytest.fixture
def folder(make_model: Callable[[str], Any], tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder: Path, config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with use():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("config", NEED_DATA.values(), ids=NEED_DATA)
def test_method_without_its_data_is_refused_and_not_rounded(config: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match="quantizes with calibration data, and from_pretrained has none"):
        load(folder, quantcore.AutoQuantizationConfig.from_dict(config))


@pytest.mark.parametrize(("method", "says"), [("awq", "name it in the config (dataset="), ("spqr", "none; load the")])
def test_only_a_config_that_takes_data_is_said_to_take_it(method: str, says: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="from_pretrained has none") as told:
        load(folder, {"quant_method": method})
    assert says in str(told.value)


def test_data_that_cannot_be_read_is_told_before_the_weights_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcore_gptq.gptq.config import GPTQConfig

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("quantcore.integrations.transformers.adapter.CalibratingLoad.begin", None)
    for name, error in (("wikitext2", ImportError), (["none.txt"], FileNotFoundError)):
        with pytest.raises(error, match=r"pip install datasets|there is no file 'none\.txt'"):
            load(folder, GPTQConfig(bits=4, dataset=name, tokenizer=tokenize))


def test_a_method_by_its_name_alone_is_a_config(folder: Path) -> None:
    assert load(folder, "hqq").config.quantization_config.quant_method == "hqq"


def test_data_of_the_config_is_what_the_model_is_calibrated_with(folder: Path, tmp_path: Path) -> None:
    from quantcore_gptq.gptq.config import GPTQConfig

    found = load(folder, GPTQConfig(bits=3, group_size=32, dataset=TEXTS, tokenizer=tokenize))
    assert found.hf_quantizer.quantizer.calibration_report is not None
    float_model = quantcore.load(folder)
    expected = quantcore.quantize(
        float_model, {"quant_method": "gptq", "bits": 3, "group_size": 32}, TEXTS, tokenizer=tokenize
    )
    layers = dict(quantized_modules(expected))
    assert layers
    for name, module in quantized_modules(found):
        for suffix, tensor in module.stored.items():
            assert torch.equal(tensor, layers[name].stored[suffix]), (name, suffix)
    rounded = quantcore.nn.QuantizedLinear.from_linear(
        quantcore.load(folder).model.layers[0].mlp.down_proj, {"quant_method": "gptq", "bits": 3, "group_size": 32}
    )
    solved = dict(quantized_modules(found))["model.layers.0.mlp.down_proj"]
    assert not torch.equal(solved.stored["qweight"], rounded.stored["qweight"])


def test_calibrated_model_loads_and_computes_again(folder: Path, tmp_path: Path) -> None:
    from quantcore_gptq.gptq.config import GPTQConfig

    model = load(folder, GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenize))
    model.save_pretrained(tmp_path / "out")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(quantcore.load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_plain_rounding_that_the_config_names_needs_no_data(folder: Path) -> None:
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 0, "disable_opt_rtn": True}
    model = load(folder, quantcore.AutoQuantizationConfig.from_dict(config))
    assert next(quantized_modules(model), None) is not None
    assert model.config.quantization_config.to_dict()["iters"] == 0
