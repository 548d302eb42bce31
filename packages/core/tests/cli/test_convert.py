"""`quantcore convert`, with a made-up method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_int8 import TinyInt8

Cli = Callable[..., Any]


def no_room(self: TinyInt8, family: Any) -> Any:
    raise ValueError("no room")


def test_convert_keeps_the_stored_tensors(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    result = cli("convert", quantized, tmp_path / "out", "--to", "tiny-int8", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["lossy"] == {}
    before, after = (load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_takes_over_what_no_flag_changes(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] |= {"bits": 8, "threshold": 2.5}
    (quantized / "config.json").write_text(json.dumps(config))
    assert cli("convert", quantized, tmp_path / "out", "--to", "tiny-int8", "--threshold", "3").code == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["bits"], written["threshold"]) == (8, 3.0)


def test_convert_to_float_leaves_no_quantization(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    assert cli("convert", quantized, tmp_path / "out", "--to-float", "--dtype", "bfloat16").code == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    floats = load_file(tmp_path / "out" / "model.safetensors")
    weights = {name.removesuffix(".scale") for name in load_file(quantized / "model.safetensors") if ".scale" in name}
    assert {floats[name].dtype for name in weights} == {torch.bfloat16}


def test_convert_names_layers_that_would_change(
    cli: Cli, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyInt8, "raise_", no_room)
    result = cli("convert", quantized, tmp_path / "out", "--to", "tiny-int8")
    assert result.code == 1
    assert "layers would change their values" in result.err
    assert not (tmp_path / "out").exists()
    result = cli("convert", quantized, tmp_path / "out", "--to", "tiny-int8", "--allow-lossy")
    assert result.code == 0
    assert "rounded anew, such as" in result.out


def test_convert_rewrites_a_pickle(cli: Cli, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "model.bin")
    (tmp_path / "quant.json").write_text('{"bits": 4}')
    result = cli(
        "convert", tmp_path / "model.bin", tmp_path / "out", "--from-pickle", "--config", tmp_path / "quant.json"
    )
    assert result.code == 0, result.err
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"a.weight"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"quantization_config": {"bits": 4}}


@pytest.mark.parametrize("flags", [[], ["--to-float", "--from-pickle"], ["--to", "tiny-int8", "--to-float"]])
def test_convert_wants_one_kind_of_result(cli: Cli, quantized: Path, tmp_path: Path, flags: list[str]) -> None:
    result = cli("convert", quantized, tmp_path / "out", *flags)
    assert result.code == 2
    assert "give one of --to NAME, --to-float and --from-pickle" in result.err


def test_convert_keeps_an_existing_folder(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = cli("convert", quantized, tmp_path / "out", "--to-float")
    assert result.code == 1
    assert "replace it with --force" in result.err
