"""A checkpoint of a method that only its plugin knows says which distribution wrote it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quantcore
from quantcore.checkpoints.described import told_with_place
from quantcore.checkpoints.files import BACKEND_KEY, with_quantization
from quantcore.cli.inventory import take_inventory
from quantcore.errors import UnknownMethodError


def test_distribution_of_a_strangers_method_is_kept(site: Any, plugin: Callable[..., str]) -> None:
    site.install("made-up", {"rows": "made_up_rows"}, {"made_up_rows": plugin("rows")}, version="2.5")
    written = with_quantization({}, {"quantization_config": {"quant_method": "rows"}}, None)
    assert written[BACKEND_KEY] == "made-up 2.5"


@pytest.mark.parametrize("described", [{"quantization_config": {"quant_method": "hqq"}}, {}], ids=["known", "float"])
def test_no_other_checkpoint_has_the_entry(described: dict[str, Any]) -> None:
    assert BACKEND_KEY not in with_quantization({BACKEND_KEY: "made-up 2.5"}, described, None)


def test_unknown_method_of_a_checkpoint_is_said_to_be_of_its_distribution(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "rows"}, BACKEND_KEY: "made-up 2.5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    for read in (quantcore.load, lambda path: quantcore.convert(path, tmp_path / "out")):
        with pytest.raises(UnknownMethodError, match=r"written by made-up 2\.5; install that") as told:
            read(tmp_path)
        assert str(told.value).startswith(f"{tmp_path / 'config.json'}: quant_method 'rows' is unknown")
    note = take_inventory(tmp_path).note
    assert note is not None
    assert "written by made-up 2.5; install that" in note


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_what_is_wrong_with_a_stored_config_is_told_with_its_file(file: str, tmp_path: Path) -> None:
    wrong = {"quant_method": "gtpq"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps({"quantization_config": wrong} if file == "config.json" else wrong))
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownMethodError, match="did you mean 'gptq'") as told:
        quantcore.load(tmp_path)
    assert str(told.value).startswith(f"{tmp_path / file}: ")


@pytest.mark.parametrize(
    "error",
    [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"), json.JSONDecodeError("no JSON", "{", 1), KeyError("bits")],
    ids=lambda error: type(error).__name__,
)
def test_error_of_any_class_keeps_its_text(error: Exception, tmp_path: Path) -> None:
    wanted = ValueError if isinstance(error, ValueError) else type(error)
    with pytest.raises(wanted, match=re.escape(str(error))), told_with_place(tmp_path, {}):
        raise error
