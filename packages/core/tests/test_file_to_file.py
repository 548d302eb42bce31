"""Checkpoint folders made from other folders: quantized without a model, and converted without its architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_int8 import TinyInt8, TinyInt8Config, TinyInt8Quantizer
from torch import nn

import quantcore
from quantcore.errors import CheckpointError, LossyConversionError

Build = Callable[[], Any]
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def folder(build_model: Build, tmp_path: Path) -> Path:
    """A float checkpoint with a config.json and a tokenizer file."""
    quantcore.save(build_model(), tmp_path / "float")
    (tmp_path / "float" / "config.json").write_text(json.dumps({"model_type": "tiny", "dtype": "float32"}))
    (tmp_path / "float" / "tokenizer.json").write_text("{}")
    return tmp_path / "float"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("shard", ["5GB", 600], ids=["one-file", "sharded"])
def test_quantized_file_to_file_is_the_quantized_model_saved(
    folder: Path, build_model: Build, tmp_path: Path, shard: int | str
) -> None:
    quantcore.save(quantcore.quantize(quantcore.load(folder, build_model), TinyInt8Config()), tmp_path / "expected")
    quantcore.quantize_checkpoint(folder, tmp_path / "out", TinyInt8Config(), model=build_model, max_shard_size=shard)
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert config(tmp_path / "out")["quantization_config"] == TinyInt8Config().to_dict()
    assert config(tmp_path / "out")["model_type"] == "tiny"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_quantize_checkpoint_casts_what_stays_float(folder: Path, build_model: Build, tmp_path: Path) -> None:
    quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-int8", model=build_model, dtype="bfloat16")
    floats = {tensor.dtype for name, tensor in tensors(tmp_path / "out").items() if name.endswith("norm.weight")}
    assert floats == {torch.bfloat16}
    assert config(tmp_path / "out")["dtype"] == "bfloat16"


def test_quantize_checkpoint_refuses_a_quantized_folder(folder: Path, build_model: Build, tmp_path: Path) -> None:
    quantcore.quantize_checkpoint(folder, tmp_path / "once", "tiny-int8", model=build_model)
    with pytest.raises(ValueError, match="once is quantized already, with tiny-int8"):
        quantcore.quantize_checkpoint(tmp_path / "once", tmp_path / "twice", "tiny-int8", model=build_model)


def test_nan_in_a_file_is_named_and_nothing_is_written(folder: Path, build_model: Build, tmp_path: Path) -> None:
    held = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in held.items() if tensor.ndim == 2 and "embed" not in name)
    held[name][1, 0] = torch.nan
    save_file(held, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name.removesuffix('.weight')}: weight holds NaN or inf, first in row 1"):
        quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-int8", model=build_model)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_tensor_that_fits_no_layer_is_an_error_before_any_work(
    folder: Path, build_model: Build, tmp_path: Path
) -> None:
    save_file({**load_file(folder / "model.safetensors"), "ghost.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ghost\.weight: surplus"):
        quantcore.quantize_checkpoint(folder, tmp_path / "out", "tiny-int8", model=build_model)


BOUNDED = """
import os, resource, torch
from torch import nn
import quantcore
os.environ["QUANTCORE_PLUGINS"] = "tiny_int8"
from quantcore import WeightQuantizer  # every import before the limit is set
from quantcore.workflows import quantize
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), used + (96 << 20)))
quantcore.quantize_checkpoint("float", "out", "tiny-int8", model=model)
"""


def test_checkpoint_larger_than_memory_is_quantized(tmp_path: Path, child_environment: dict[str, str]) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
    quantcore.save(model, tmp_path / "float", max_shard_size="100MB")  # 192 MiB
    (tmp_path / "float" / "config.json").write_text('{"dtype": "float32"}')
    # Each thread would reserve 64 MiB of addresses for what it allocates, more of them on a machine with more cores.
    environment = {**child_environment, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    options: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", BOUNDED], check=False, **options)
    assert done.returncode == 0, done.stderr
    assert len(tensors(tmp_path / "out")) == 96


# Conversion


@pytest.fixture
def quantized(folder: Path, build_model: Build, tmp_path: Path) -> Path:
    quantcore.quantize_checkpoint(folder, tmp_path / "int8", "tiny-int8", model=build_model)
    return tmp_path / "int8"


def write_as(monkeypatch: pytest.MonkeyPatch, weight_format: TinyInt8) -> None:
    """Makes the method write another format than the one it reads."""

    def stored_weight(self: Any, name: str, stored: dict[str, Any], dtype: Any) -> Any:
        return (TinyInt8(), tuple(stored["weight"].shape)) if "weight.scale" in stored else None

    monkeypatch.setattr(TinyInt8Quantizer, "stored_weight", stored_weight)
    monkeypatch.setattr(TinyInt8Quantizer, "format_for", lambda self, name, module: weight_format)


def no_room(self: TinyInt8, family: Any) -> Any:
    raise ValueError("no room")


def test_conversion_keeps_every_value(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as(monkeypatch, TinyInt8(names=("codes", "scale")))
    done = quantcore.convert(quantized, tmp_path / "out", "tiny-int8")
    before, after = tensors(quantized), tensors(tmp_path / "out")
    assert done.exact
    assert not done.lossy
    for name in done.exact:
        assert torch.equal(after[f"{name}.codes"], before[f"{name}.weight"])
        assert torch.equal(after[f"{name}.scale"], before[f"{name}.weight.scale"])
    plain = {name for name in before if name.rpartition(".")[0].removesuffix(".weight") not in done.exact}
    assert all(torch.equal(after[name], before[name]) for name in plain)


def test_conversion_that_changes_values_says_why_once_and_of_how_many_layers(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyInt8, "raise_", no_room)
    with pytest.raises(LossyConversionError, match="would change their values") as caught:
        quantcore.convert(quantized, tmp_path / "out", "tiny-int8")
    layers = {name.removesuffix(".weight.scale") for name in tensors(quantized) if name.endswith(".scale")}
    head, *reasons = str(caught.value).splitlines()
    assert f"{len(layers)} layers would change" in head
    assert [line.endswith(": no room") for line in reasons] == [True]
    assert min(layers) in reasons[0]
    assert not (tmp_path / "out").exists()


def test_values_that_differ_are_found_whatever_the_format_claims(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyInt8, "raise_", lambda self, family: dict.fromkeys(self.names, family.scales()))
    with pytest.raises(LossyConversionError, match="rounds the same codes and scales to other values"):
        quantcore.convert(quantized, tmp_path / "out", "tiny-int8")


def test_allowed_lossy_conversion_rounds_anew_and_says_so(
    quantized: Path, build_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyInt8, "raise_", no_room)
    done = quantcore.convert(quantized, tmp_path / "out", "tiny-int8", allow_lossy=True)
    assert not done.exact
    assert set(done.lossy.values()) == {"no room"}
    before, after = quantcore.load(quantized, build_model), quantcore.load(tmp_path / "out", build_model)
    for name in done.lossy:
        weight, found = (model.get_submodule(name).dequantize() for model in (before, after))
        torch.testing.assert_close(found, weight, rtol=0, atol=weight.abs().max() / 200)


def test_conversion_to_float_dequantizes(quantized: Path, build_model: Build, tmp_path: Path) -> None:
    quantcore.convert(quantized, tmp_path / "out")
    expected = quantcore.dequantize(quantcore.load(quantized, build_model)).state_dict()
    found = quantcore.load(tmp_path / "out", build_model).state_dict()
    assert "quantization_config" not in config(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_float_folder_is_not_converted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float is not quantized; use quantcore quantize"):
        quantcore.convert(folder, tmp_path / "out", "tiny-int8")
