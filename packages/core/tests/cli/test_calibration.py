"""`quantcore quantize` with a method that calibrates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import Language, make
from torch import nn

import quantcore
from quantcore.plugins import manager

Cli = Callable[..., Any]
METHOD = ("--method", "tiny-calibrated")


class Letters:
    """A tokenizer of lower-case letters."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


@pytest.fixture
def language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float checkpoint of the small language model, and a served method that calibrates."""
    monkeypatch.setenv("QUANTCORE_PLUGINS", "tiny_calibrated,tiny_int8")
    manager.reset()
    folder = tmp_path / "float"
    quantcore.save(make(Language), folder)
    (folder / "config.json").write_text('{"architectures": ["Language"]}')
    monkeypatch.setattr("quantcore.integrations.transformers.build_model", lambda directory: make(Language))
    monkeypatch.setattr("quantcore.integrations.transformers.load_tokenizer", lambda directory: Letters())
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("thequickbrownfoxjumpsoverthelazydog" * 4)
    return file


def reference(**settings: Any) -> nn.Module:
    data = "thequickbrownfoxjumpsoverthelazydog" * 4
    return quantcore.quantize(
        make(Language), {"quant_method": "tiny-calibrated"}, calibration=data, tokenizer=Letters(), **settings
    )


def test_flags_choose_what_to_calibrate_with(cli: Cli, language: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--calibration", text, "--samples", 6, "--seqlen", 9, "--batch-size", 4)
    result = cli("quantize", language, tmp_path / "out", *METHOD, *flags)
    assert result.code == 0, result.err
    expected = reference(samples=6, seqlen=9, batch_size=4)
    loaded = quantcore.load(tmp_path / "out", lambda: make(Language))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_result_has_a_table_by_kind_of_layer(cli: Cli, language: Path, text: Path, tmp_path: Path) -> None:
    out = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", text, "--seqlen", 7).out
    assert "calibrated on 20 rows with 140 tokens in" in out
    line = next(line for line in out.splitlines() if line.startswith("q_proj"))
    assert line.split()[1:3] == ["tiny-calibrated", "3"]
    assert out.splitlines()[-1].startswith("made ")


def test_fallbacks_are_named_with_their_reason(cli: Cli, language: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--calibration", text, "--seqlen", 7, "--minimum-tokens", 141)
    out = cli("quantize", language, tmp_path / "out", *METHOD, *flags).out
    assert "adapter: round to nearest, for 140 tokens reached it, fewer than 141" in out
    assert "... and 8 more; --json shows all" in out


def test_json_holds_a_line_for_each_layer(cli: Cli, language: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--calibration", text, "--seqlen", 7, "--json")
    report = json.loads(cli("quantize", language, tmp_path / "out", *METHOD, *flags).out)["calibration"]
    assert (report["samples"], report["tokens"], len(report["layers"])) == (20, 140, 14)
    assert report["layers"][0]["name"] == "adapter"


def test_without_data_the_flag_is_asked_for_before_any_work(cli: Cli, language: Path, tmp_path: Path) -> None:
    result = cli("quantize", language, tmp_path / "out", *METHOD)
    assert result.code == 2
    assert "flag --calibration is missing" in result.err


@pytest.mark.parametrize("flags", [("--calibration", "x"), ("--seqlen", 5), ("--samples", 1, "--resume", "x")])
def test_flags_for_a_method_that_takes_no_data_are_a_usage_error(
    cli: Cli, language: Path, tmp_path: Path, flags: tuple[Any, ...]
) -> None:
    result = cli("quantize", language, tmp_path / "out", "--method", "tiny-int8", *flags)
    assert result.code == 2
    assert f"takes no calibration data; leave {flags[0]}" in result.err


def test_a_missing_file_is_one_line(cli: Cli, language: Path, tmp_path: Path) -> None:
    result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", tmp_path / "none.txt")
    assert result.code == 1
    assert "none.txt: No such file" in result.err
    assert "Traceback" not in result.err


def test_a_dry_run_needs_no_data(cli: Cli, language: Path) -> None:
    result = cli("quantize", language, *METHOD, "--dry-run")
    assert result.code == 0
    assert "quantized (14 layers)" in result.out


def test_an_interrupted_run_says_how_to_go_on_and_does(
    cli: Cli, language: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_calibrated import TinyCalibratedQuantizer

    flags = (*METHOD, "--calibration", text, "--seqlen", 7, "--resume", tmp_path / "state")
    solve = TinyCalibratedQuantizer.solve_block
    with monkeypatch.context() as patched:

        def interrupted(self: TinyCalibratedQuantizer, block: Any) -> None:
            if block.name == "layers.1":
                raise KeyboardInterrupt
            solve(self, block)

        patched.setattr(TinyCalibratedQuantizer, "solve_block", interrupted)
        result = cli("quantize", language, tmp_path / "out", *flags)
    assert result.code == 1
    assert f"the same command goes on from the finished blocks in {tmp_path / 'state'}" in result.err
    assert not (tmp_path / "out").exists()
    assert cli("quantize", language, tmp_path / "out", *flags).code == 0
    loaded = quantcore.load(tmp_path / "out", lambda: make(Language))
    expected = reference(seqlen=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
