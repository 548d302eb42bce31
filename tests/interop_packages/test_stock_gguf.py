"""What we save as GGUF is read by the package gguf, with the values that we read. Needs it; run by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import quantcore
from quantcore.nn.replace import quantized_modules

TYPES = ("Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")


@pytest.mark.parametrize("name", TYPES)
def test_reader_finds_names_types_and_values(make_model: Callable[[str], Any], name: str, tmp_path: Path) -> None:
    config = {"quant_method": "gguf", "type": name, "pure": True}
    quantcore.save(quantcore.quantize(make_model("llama"), config), tmp_path / "ours.gguf")
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    read = {tensor.name: tensor for tensor in reader.tensors}
    loaded = quantcore.load(tmp_path / "ours.gguf")
    layers = dict(quantized_modules(loaded))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert sum(tensor.tensor_type.name == name for tensor in read.values()) == len(layers)
    for layer, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v"), ("mlp.gate_proj", "ffn_gate")):
        for block in range(2):
            found = read[f"blk.{block}.{theirs}.weight"]
            values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
            assert torch.equal(values, layers[f"model.layers.{block}.{layer}"].dequantize(torch.float32))
