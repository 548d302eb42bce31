"""`quantcore recommend`: the configs that bring a model into a given memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import quantcore

Cli = Callable[..., Any]


def test_config_that_fits_has_the_size_and_error_that_quantizing_gives(
    cli: Cli, method: str, source: Path, tmp_path: Path
) -> None:
    result = cli("recommend", source, "--memory", "1MB", "--json")
    (found,) = json.loads(result.out)
    quantcore.quantize_checkpoint(source, tmp_path / "q", method)
    assert found["method"] == method
    assert found["bytes"] == sum(tensor.nbytes for tensor in load_file(tmp_path / "q" / "model.safetensors").values())
    assert 0 < found["error"] < 0.02  # of int8 with a scale per row: about 0.005


def test_text_has_a_row_for_each_config(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source, "--memory", "1MB", "--method", method)
    assert [line.split()[0] for line in result.out.splitlines()] == ["method", method]


def test_nothing_that_fits_is_an_error_that_names_the_smallest(cli: Cli, method: str, source: Path) -> None:
    result = cli("recommend", source, "--memory", "10")
    assert result.code == 1
    assert f"does not fit 10: the smallest is 1.81 kB, by {method}; allow more memory" in result.err


@pytest.mark.parametrize(("flags", "reason"), [(["--memory", "much"], "size 'much'"), ([], "--memory")], ids=str)
def test_memory_must_be_a_size(cli: Cli, method: str, source: Path, flags: list[str], reason: str) -> None:
    result = cli("recommend", source, *flags)
    assert result.code in (1, 2)
    assert reason in result.err
