"""Hub ids in place of folders: found in the hub's cache, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import quantcore
from quantcore.workflows.quantize import quantize_checkpoint

Make = Callable[[str], Any]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IDS = torch.arange(12).view(2, 6) * 7 % 96
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(folder: Path, cache: Path, name: str) -> None:
    """Lay a folder out as the hub's cache holds a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


def test_quantized_model_of_the_cache_loads_by_its_id(cache: Path, make_model: Make, tmp_path: Path) -> None:
    model = quantcore.quantize(make_model("llama"), NF4)
    quantcore.save(model, tmp_path / "out", max_shard_size="60KB")
    put(tmp_path / "out", cache, "somebody/small-llama.nf4")
    assert torch.equal(quantcore.load("somebody/small-llama.nf4")(IDS).logits, model(IDS).logits)


def test_float_model_of_the_cache_is_quantized_by_its_id(cache: Path, make_model: Make, tmp_path: Path) -> None:
    quantcore.save(make_model("llama"), tmp_path / "float")
    put(tmp_path / "float", cache, "somebody/float")
    quantize_checkpoint("somebody/float", tmp_path / "out", NF4)
    expected = quantcore.quantize(make_model("llama"), NF4)
    assert torch.equal(quantcore.load(tmp_path / "out")(IDS).logits, expected(IDS).logits)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["nobody/nothing", "bad--name/x", "nobody/-x"])
def test_id_that_is_nowhere_is_one_error_that_names_it(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} (is no folder here, and the hub|does not exist)"):
        quantcore.load(name)
