"""Checkpoints that AMD Quark wrote: loaded through transformers' architectures, run, saved to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quantcore
from quantcore.testing.golden import golden_folder

FILE = "model.safetensors"
FOLDERS = sorted(golden_folder("quark", Path(__file__).parent / "golden").glob("checkpoint-*"))
# Relative error of logits in bfloat16, which another machine gave: sums are in another order, and where inputs are
# rounded to 4 or 8 bits a last bit becomes a step: 0.068 for FP4, 0.026 for FP8, 0.006 for floats (AVX2 beside AMX).
# Layers by themselves are compared bit for bit.
TOLERANCE = 0.1


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_golden_set_rounds_keys_and_values() -> None:
    assert "checkpoint-fp8-kv" in {folder.name for folder in FOLDERS}


def test_loaded_checkpoint_gives_the_logits_of_upstream(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        found = quantcore.load(folder)(expected["input_ids"]).logits.float()
    assert (found - expected["logits"]).norm() <= TOLERANCE * expected["logits"].norm()


def test_saved_again_the_files_are_the_same(folder: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(folder), tmp_path / "out")
    given, found = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert found["quantization_config"] == given["quantization_config"]
    assert (tmp_path / "out" / FILE).read_bytes() == (folder / FILE).read_bytes()
