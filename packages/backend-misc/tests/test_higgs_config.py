"""Bits that the config of HIGGS gives single layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantcore import AutoHfQuantizer
from quantcore_misc.higgs.config import HiggsConfig


def test_layer_has_the_bits_of_its_entry_and_others_those_of_the_config() -> None:
    config = HiggsConfig(bits=4, tune_metadata={"a": {"num_bits": 2}, "b": {"template_id": 16}})
    assert [config.bits_of(name) for name in ("a", "b", "c")] == [2, 4, 4]


def test_tile_is_that_of_the_layers_own_bits() -> None:
    config = HiggsConfig(bits=4, tune_metadata={"a": {"num_bits": 2, "template_id": 12}, "b": {"template_id": 12}})
    assert [config.tile_of(name) for name in ("a", "b")] == [64, 64]
    config = HiggsConfig(bits=4, tune_metadata={"a": {"num_bits": 2, "template_id": 4}, "b": {"template_id": 4}})
    assert [config.tile_of(name) for name in ("a", "b")] == [32, 64]


@pytest.mark.parametrize("bits", [8, "4", None])
def test_bits_without_a_grid_are_refused_with_the_layer(bits: object) -> None:
    with pytest.raises(ValueError, match=r"tune_metadata\['a'\].num_bits must be one of 2, 3, 4; got"):
        HiggsConfig(tune_metadata={"a": {"num_bits": bits}})


def test_formats_follow_the_entries() -> None:
    config = HiggsConfig(bits=4, hadamard_size=128, group_size=64, tune_metadata={"a": {"num_bits": 2}})
    quantizer = AutoHfQuantizer.from_config(config)
    layer = nn.Linear(256, 256, device="meta", dtype=torch.float16)
    assert [quantizer.format_for(name, layer).bits for name in ("a", "b")] == [2, 4]
