"""A quantized model of transformers says how many weights the float model has, and how many bytes it takes itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore.integrations.transformers import use

Make = Callable[[str], Any]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 32}
CT = {"quant_method": "compressed-tensors", "scheme": "W8A8"}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
TORCHAO = {"quant_method": "torchao", "quant_type": "int8_weight_only", "include_input_output_embeddings": True}
FBGEMM = {"quant_method": "fbgemm_fp8"}
CASES = [
    ("llama", NF4),
    ("llama-tied", TORCHAO),  # embedding and head share what is stored
    ("gemma3", HQQ),
    ("gpt2", NF4),
    ("qwen3", CT),
    ("mixtral", FP8),
    ("llama4", FBGEMM),  # stores the 3-D weights of experts whole
]


def counts(model: Any) -> list[int]:
    options = ({}, {"exclude_embeddings": True})
    return [part.num_parameters(**given) for part in (model, model.base_model) for given in options]


def stored_bytes(model: Any) -> int:
    """Of what the model saves, shared tensors once."""
    tensors = {(tensor.data_ptr(), tensor.nbytes): tensor for tensor in model.state_dict().values()}
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(("family", "config"), CASES, ids=[family for family, _ in CASES])
def test_weights_are_counted_as_the_float_model_counts_them(
    family: str, config: dict[str, Any], make_model: Make, tmp_path: Path
) -> None:
    model = make_model(family)
    expected = counts(model)
    quantcore.save(quantcore.quantize(copy.deepcopy(model), config), tmp_path / "quantized")
    with use():
        served = type(model).from_pretrained(tmp_path / "quantized")
    for found in (served, quantcore.load(tmp_path / "quantized")):
        assert counts(found) == expected
        assert found.get_memory_footprint(return_buffers=False) <= stored_bytes(found)
        assert found.get_memory_footprint() >= stored_bytes(found) > 0
        assert counts(copy.deepcopy(found)) == counts(pickle.loads(pickle.dumps(found))) == expected  # noqa: S301 - made here
        assert counts(found.dequantize()) == expected
        assert not any("num_parameters" in vars(module) for module in found.modules())


def test_trainable_weights_are_those_that_are_not_quantized(make_model: Make) -> None:
    model = make_model("llama")
    linear = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    expected = model.num_parameters() - linear
    assert quantcore.quantize(model, HQQ).num_parameters(only_trainable=True) == expected


def test_the_count_keeps_no_model_alive(make_model: Make) -> None:
    model = quantcore.quantize(make_model("llama"), HQQ)
    there, layer = weakref.ref(model), weakref.ref(model.model.layers[0])
    gc.disable()
    try:
        del model
        assert there() is None
        assert layer() is None
    finally:
        gc.enable()


def test_a_cast_changes_bytes_and_no_count(make_model: Make) -> None:
    model = quantcore.quantize(make_model("llama"), HQQ)
    count, size = model.num_parameters(), model.get_memory_footprint()
    model.to(torch.bfloat16)
    assert model.num_parameters() == count
    assert model.get_memory_footprint() < size
