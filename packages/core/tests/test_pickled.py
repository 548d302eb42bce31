"""Pickled checkpoints: rewritten without running anything that they hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantcore.checkpoints.pickled import rewrite_pickled
from quantcore.errors import CheckpointError


class Harmful:
    """A pickle that would make a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def content() -> dict[str, Any]:
    weight = torch.arange(6.0).view(2, 3)
    meta = {"nbits": 4, "scale": torch.ones(2, dtype=torch.float16), "inner": {"zero": torch.zeros(1)}}
    return {"a.weight": weight, "b": {"W_q": weight.to(torch.uint8), "meta": meta, "bias": None}, "tied": weight}


EXPECTED = {"a.weight", "tied", "b.W_q", "b.meta.scale", "b.meta.inner.zero"}


@pytest.mark.parametrize("zipped", [True, False], ids=["torch-1.6", "before"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "state_dict"])
def test_tensors_keep_names_and_bytes(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"model_type": "tiny"}')
    held = {"state_dict": content()} if wrapped else content()
    torch.save(held, tmp_path / "in" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    rewrite_pickled(tmp_path / "in", tmp_path / "out", {"quant_method": "hqq"})
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == EXPECTED
    assert torch.equal(found["a.weight"], content()["a.weight"])
    assert torch.equal(found["b.W_q"], content()["b"]["W_q"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "tiny", "quantization_config": {"quant_method": "hqq"}}


def test_single_file_and_several_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "2.bin")
    rewrite_pickled(tmp_path / "1.bin", tmp_path / "one")
    rewrite_pickled(tmp_path, tmp_path / "both")
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == {"a"}
    assert load_file(tmp_path / "both" / "model.safetensors").keys() == {"a", "b"}


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Harmful(tmp_path / "ran")}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin: is damaged, or holds more than tensors"):
        rewrite_pickled(tmp_path / "model.bin", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("held", "fault"),
    [([torch.ones(1)], "expected a dictionary of tensors, got list"), (b"PK\x03\x04junk", "is damaged")],
    ids=["list", "damaged"],
)
def test_other_content_is_refused(tmp_path: Path, held: Any, fault: str) -> None:
    if isinstance(held, bytes):
        (tmp_path / "model.pt").write_bytes(held)
    else:
        torch.save(held, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=fault):
        rewrite_pickled(tmp_path / "model.pt", tmp_path / "out")


def test_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    for name in ("1.bin", "2.bin"):
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"2\.bin: a stands in another file too"):
        rewrite_pickled(tmp_path, tmp_path / "out")


def test_folder_without_pickles_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no file of the kinds \*\.bin"):
        rewrite_pickled(tmp_path, tmp_path / "out")
