"""What we save loads in the hqq package, layer by layer, and multiplies as ours does. Needs hqq; run by name only.

hqq's own loader of whole models reads its pickled files alone, and no transformers since 5.0 loads an hqq checkpoint:
it leaves random weights in place of every quantized layer. What upstream still reads is the tensors of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core.quantize import HQQBackend, HQQLinear
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantcore
from quantcore.nn.replace import quantized_modules

Make = Callable[[str], Any]
CONFIGS: dict[str, dict[str, Any]] = {
    "8bit": {"nbits": 8, "group_size": 64},
    "4bit": {"nbits": 4, "group_size": 64},
    "4bit-axis0": {"nbits": 4, "group_size": 32, "axis": 0},
    "4bit-as-float": {"nbits": 4, "group_size": 64, "view_as_float": True},
    "3bit": {"nbits": 3, "group_size": 64},
    "2bit": {"nbits": 2, "group_size": 16},
    "1bit": {"nbits": 1, "group_size": 32},
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def folder(request: pytest.FixtureRequest, make_model: Make, tmp_path: Path) -> Path:
    """A checkpoint of a small GPT-like model, whose layers have biases, that we quantized and saved."""
    quantcore.save(quantcore.quantize(make_model("opt"), {"quant_method": "hqq", **request.param}), tmp_path / "ours")
    return tmp_path / "ours"


def upstream_layer(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> HQQLinear:
    """The package's layer of one module's tensors, computing in plain torch."""
    layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
    layer.load_state_dict({key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")})
    layer.set_backend(HQQBackend.PYTORCH)
    return layer


def test_hqq_loads_every_layer_to_our_weight_and_bias(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, ours in quantized_modules(quantcore.load(folder)):
        theirs = upstream_layer(dict(tensors), name, torch.float32)
        assert torch.equal(theirs.dequantize(), ours.dequantize())
        assert torch.equal(theirs.bias, ours.bias)


def test_hqq_multiplies_as_we_do(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, ours in quantized_modules(quantcore.load(folder)):
        x = torch.linspace(-1, 1, 3 * ours.shape[1]).view(3, -1)
        torch.testing.assert_close(upstream_layer(dict(tensors), name, torch.float32)(x), ours(x))


def test_stock_transformers_still_cannot_load_hqq(folder: Path) -> None:
    # When this fails, upstream loads hqq again: compare whole models here.
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {f"{name}.weight" for name, _ in quantized_modules(quantcore.load(folder))} <= set(report["missing_keys"])
