"""Checkpoints that llm-compressor wrote: loaded through transformers' architectures, run, saved to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantcore
from quantcore.nn.replace import quantized_modules
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_folder

FILE = "model.safetensors"
GOLDEN = golden_folder("compressed-tensors", Path(__file__).parent / "golden")
FOLDERS = sorted(GOLDEN.glob("checkpoint-*"))
# Relative error of logits in bfloat16. Stock transformers on the machine of the tests differs from the golden logits,
# which another machine gave, as much as we do: by 0.006 where weights alone are rounded, by up to 0.039 (AVX2 beside
# AMX) where the rounding of activations to 8 bits turns the last bit of a product into a step.
TOLERANCE = 0.06


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids).logits
    assert isinstance(found, Tensor)
    return found


def test_golden_set_holds_several_mechanisms() -> None:
    names = {folder.name for folder in FOLDERS}
    assert names >= {"checkpoint-mixed", "checkpoint-quip-w4a16", "checkpoint-fp8-dynamic-kv"}


def test_loaded_checkpoint_gives_the_logits_of_its_maker(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    found = logits(quantcore.load(folder), expected["input_ids"])
    wanted = expected.get("logits_made", expected.get("logits"))
    assert wanted is not None
    assert relative_error(found, wanted) <= TOLERANCE


def test_dequantized_checkpoint_gives_the_logits_of_its_weights(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    wanted = expected.get("logits_dequantized", expected.get("logits_made", expected.get("logits")))
    assert wanted is not None
    model = quantcore.dequantize(quantcore.load(folder))
    assert list(quantized_modules(model)) == []
    # Where upstream gives no logits without rounded activations, those with are what there is to compare with.
    is_exact = "logits_dequantized" in expected or ("fp8" not in folder.name and "mixed" not in folder.name)
    assert relative_error(logits(model, expected["input_ids"]), wanted) <= (TOLERANCE if is_exact else 0.1)


def test_saved_again_tensors_and_config_are_the_same(folder: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(folder), tmp_path / "out")
    assert differences(load_file(tmp_path / "out" / FILE), load_file(folder / FILE)) == []
    found, expected = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", folder))
    assert found["quantization_config"] == expected["quantization_config"]


def test_state_dict_holds_what_the_file_holds(folder: Path, tmp_path: Path) -> None:
    quantcore.save(quantcore.load(folder), tmp_path / "out", max_shard_size="50KB")
    assert differences(quantcore.load(tmp_path / "out").state_dict(), load_file(folder / FILE)) == []


def test_token_after_a_rounded_cache_gets_the_logits_of_the_whole_text() -> None:
    model = quantcore.load(GOLDEN / "checkpoint-fp8-dynamic-kv")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        cache = model(ids[:, :7], use_cache=True).past_key_values
        step = model(ids[:, 7:], past_key_values=cache).logits
    assert type(cache).__module__.startswith("transformers")
    assert relative_error(step[:, -1], logits(model, ids)[:, -1]) <= TOLERANCE  # one row is summed otherwise than eight


def test_model_of_an_older_file_with_another_key_loads(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    ids = load_file(folder / "expected.safetensors")["input_ids"]
    loaded = quantcore.load(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(quantcore.load(folder), ids))
    quantcore.save(quantcore.dequantize(loaded), tmp_path / "out")
    assert "compression_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4A16", "MXFP4"])
def test_tied_model_is_quantized_saved_and_loaded(
    make_model: Callable[[str], Any], scheme: str, tmp_path: Path
) -> None:
    model = quantcore.quantize(make_model("llama-tied"), {"quant_method": "compressed-tensors", "scheme": scheme})
    ids = torch.arange(12).view(2, 6)
    quantcore.save(model, tmp_path / "out")
    assert torch.equal(logits(quantcore.load(tmp_path / "out"), ids), logits(model, ids))
