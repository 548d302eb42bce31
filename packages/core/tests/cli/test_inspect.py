"""`quantcore inspect`: what a checkpoint stores, told from its headers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantcore.checkpoints.owners import by_owner
from quantcore.plugins import manager

Cli = Callable[..., Any]
METHOD = "tiny-int8"


def test_inspect_describes_each_module(cli: Cli, quantized: Path) -> None:
    found = json.loads(cli("inspect", quantized, "--json").out)
    rows = {row["module"]: row for row in found["modules"]}
    assert found["method"] == METHOD
    assert (rows["second"]["shape"], rows["second"]["bits_per_weight"]) == ([16, 32], 8 + 32 / 32)
    assert rows["first"]["format"] == "TinyInt8(names=('weight', 'weight.scale'), multiple=1)"
    assert (rows["norm"]["format"], rows["norm"]["is_quantized"]) == ("float32", False)


def test_the_bias_of_a_layer_counts_as_bytes_but_not_as_bits_of_its_weight(cli: Cli, quantized: Path) -> None:
    rows = {row["module"]: row for row in json.loads(cli("inspect", quantized, "--json").out)["modules"]}
    assert rows["first"]["bits_per_weight"] == 8 + 32 / 16
    assert rows["first"]["bytes"] == 32 * 16 + 32 * 4 + 32 * 4


def test_totals_of_inspect_are_those_of_the_file(cli: Cli, quantized: Path) -> None:
    stored = load_file(quantized / "model.safetensors").values()
    found = json.loads(cli("inspect", quantized, "--json").out)
    assert found["bytes"] == sum(row["bytes"] for row in found["modules"]) == sum(t.nbytes for t in stored)


def test_inspect_reads_a_float_checkpoint(cli: Cli, source: Path) -> None:
    result = cli("inspect", source)
    assert result.code == 0
    assert "method: none, a float checkpoint" in result.out


def test_inspect_lists_every_tensor(cli: Cli, quantized: Path) -> None:
    found = json.loads(cli("inspect", quantized, "--tensors", "--json").out)
    names = {f"{row['module']}.{row['tensor']}".lstrip(".") for row in found["tensors"]}
    assert names == set(load_file(quantized / "model.safetensors"))


def test_quiet_inspect_is_a_number(cli: Cli, quantized: Path) -> None:
    assert float(cli("inspect", quantized, "--quiet").out) > 8


def test_inspect_names_every_damaged_layer(cli: Cli, quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    del tensors["first.weight.scale"]
    tensors["second.weight.scale"] = tensors["second.weight.scale"].half()
    save_file(tensors, quantized / "model.safetensors")
    result = cli("inspect", quantized)
    assert result.code == 1
    assert "first: weight.scale: missing, expected float32 [32, 1]" in result.err
    assert "second: weight.scale: expected float32 [16, 1], got float16 [16, 1]" in result.err
    assert "lm_head" in result.out


def test_inspect_shows_what_it_can_when_the_backend_is_absent(
    cli: Cli, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QUANTCORE_PLUGINS")
    manager.reset()
    result = cli("inspect", quantized)
    assert result.code == 0
    assert f"config.json: quant_method {METHOD!r} is unknown" in result.err
    assert "not readable" in result.out
    assert "unknown" in result.out
    assert "lm_head" in result.out


def test_no_module_has_the_name_of_a_tensor() -> None:
    names = ["a.b.weight", "a.b.weight.scale", "a.b.weight.state.nf4", "a.norm", "top"]
    assert {owner: set(group) for owner, group in by_owner(dict.fromkeys(names)).items()} == {  # type: ignore[arg-type]
        "a.b": {"weight", "weight.scale", "weight.state.nf4"},
        "a": {"norm"},
        "": {"top"},
    }
