"""A layer by all its names."""

from __future__ import annotations

import pytest

from quantcore.checkpoints.names import module_names
from quantcore.checkpoints.read import Checkpoint
from quantcore.layer_names import LayerName, spellings


def test_a_name_knows_its_others_and_is_the_same_text() -> None:
    name = LayerName.of("model.layers.0.up", ["model.layers.0.up", "layers.0.up", "layers.0.up"])
    assert name == "model.layers.0.up"
    assert {name: 1}["model.layers.0.up"] == 1
    assert spellings(name) == ("model.layers.0.up", "layers.0.up")


@pytest.mark.parametrize("others", [[], ["fc"]])
def test_a_name_without_others_is_plain(others: list[str]) -> None:
    assert type(LayerName.of("fc", others)) is str
    assert spellings("fc") == ("fc",)


def test_modules_of_a_renamed_checkpoint_know_what_the_files_call_them(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import torch

    from quantcore.checkpoints.write import write_tensors

    write_tensors({"text.layers.0.fc.weight.scale": torch.ones(1), "norm.weight": torch.ones(1)}, tmp_path)
    view = Checkpoint(tmp_path).renamed({"text.layers.0.fc.weight.scale": "model.layers.0.fc.weight.scale"})
    names = module_names(view)
    assert names["model.layers.0.fc"] == "text.layers.0.fc"
    assert names["model.layers.0"] == "text.layers.0"
    assert "norm" not in names
