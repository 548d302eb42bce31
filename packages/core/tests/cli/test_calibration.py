"""`quantcore quantize` with a method that calibrates."""

from __future__ import annotations

import importlib
import json
import re
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
# Modules that import the tokenizer's loader by name: first imported under a test, they would keep its stand-in.
_TAKE_THE_NAME = ("quantcore.workflows.evaluation", "quantcore.cli.report.looking")


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
    for module in _TAKE_THE_NAME:
        importlib.import_module(module)
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


def test_a_bound_of_memory_gives_the_same_files(cli: Cli, language: Path, text: Path, tmp_path: Path) -> None:
    flags = (*METHOD, "--sequential", "--calibration", text, "--seqlen", 9)
    assert cli("quantize", language, tmp_path / "whole", *flags).code == 0
    result = cli("quantize", language, tmp_path / "parts", *flags, "--max-memory", "12KB")
    assert result.code == 0, result.err
    parts, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("parts", "whole"))
    assert parts == whole


@pytest.mark.parametrize(
    ("size", "flags", "said"),
    [
        (
            "1KB",
            ("--sequential",),
            r"--max-memory 1000: block layers\.0 takes \d+ bytes at least.*give --max-memory \d+ or more",
        ),
        ("8GB", (), "--max-memory '8GB': .*tiny-calibrated.* holds a block as a whole"),
    ],
)
def test_a_bound_that_cannot_be_kept_is_told(
    size: str, flags: tuple[str, ...], said: str, cli: Cli, language: Path, text: Path, tmp_path: Path
) -> None:
    options = (*METHOD, *flags, "--calibration", text, "--seqlen", 9, "--max-memory", size)
    result = cli("quantize", language, tmp_path / "out", *options)
    assert result.code == 1
    assert re.search(said, result.err)
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_one_line(cli: Cli, language: Path, tmp_path: Path) -> None:
    result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", tmp_path / "none.txt")
    assert result.code == 1
    assert re.search(r"^Error: --calibration .*none\.txt: no such file", result.err, re.MULTILINE)
    assert "Traceback" not in result.err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-memory", "much"), "Invalid value for --max-memory: size 'much' is not understood; write it as '5GB'"),
        (("--resume", "text.txt"), "Invalid value for --resume: text.txt is no folder"),
        (("--offload", "text.txt"), "Invalid value for --offload: text.txt is no folder"),
        (("--seqlen", 65), "Invalid value for --seqlen: 65 is more than the 64 positions"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_flag_that_cannot_be_is_told_before_the_model_is_read(
    flags: tuple[str, ...],
    said: str,
    dry: list[str],
    cli: Cli,
    language: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (language / "config.json").write_text('{"architectures": ["Language"], "max_position_embeddings": 64}')
    monkeypatch.chdir(text.parent)
    monkeypatch.setattr("quantcore.workflows.quantize.open_float", None)
    result = cli("quantize", language, "out", *METHOD, "--calibration", text, *flags, *dry)
    assert (result.code, said in result.err) == (2, True), result.err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_data_that_is_no_text_is_told_by_its_flag_before_the_model_is_read(
    dry: list[str], cli: Cli, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcore.workflows.quantize.open_float", None)
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe")
    for name, said in (("bytes.bin", "is no UTF-8 text"), ("float", "Is a directory; give a file of UTF-8 text")):
        result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", tmp_path / name, *dry)
        assert re.search(rf"Error: --calibration .*{name}:? {said}", result.err), result.err
        assert result.code == 1


def test_a_word_that_is_no_file_and_no_data_set_is_a_usage_error(cli: Cli, language: Path, tmp_path: Path) -> None:
    result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", "wikitext3")
    assert result.code == 2
    assert "--calibration wikitext3: no such file, and no data set of that name; known: wikitext2, c4" in result.err


@pytest.mark.parametrize("name", ["wikitext2", "c4", "pileval"])
def test_a_data_set_by_name_is_read(
    cli: Cli, language: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []

    def read(name: str) -> Any:
        asked.append(name)
        return iter([text.read_text()])

    monkeypatch.setattr("quantcore.calibration.data.named_texts", read)
    monkeypatch.setattr("quantcore.calibration.datasets.check_named", lambda name: None)
    result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", name, "--seqlen", 8)
    assert (result.code, asked) == (0, [name]), result.err


def test_a_data_set_says_what_to_install(
    cli: Cli, language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    result = cli("quantize", language, tmp_path / "out", *METHOD, "--calibration", "wikitext2")
    assert result.code == 1
    assert "data set 'wikitext2' needs the package datasets; pip install datasets" in result.err


def test_a_dry_run_needs_no_data(cli: Cli, language: Path) -> None:
    result = cli("quantize", language, *METHOD, "--dry-run")
    assert result.code == 0
    assert "quantized (14 layers)" in result.out


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (None, "the same command goes on from the finished blocks, kept beside OUT; with --resume DIR they are"),
        ("state", "the same command, with --resume state, goes on from the finished blocks"),
    ],
    ids=["beside", "chosen"],
)
def test_an_interrupted_run_says_how_to_go_on_and_does(
    cli: Cli,
    language: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: str | None,
    said: str,
) -> None:
    from tiny_calibrated import TinyCalibratedQuantizer

    monkeypatch.chdir(tmp_path)
    flags = (*METHOD, "--calibration", text, "--seqlen", 7, *(() if folder is None else ("--resume", folder)))
    solve = TinyCalibratedQuantizer.solve_block
    with monkeypatch.context() as patched:

        def interrupted(self: TinyCalibratedQuantizer, block: Any) -> None:
            if block.name == "layers.1":
                raise KeyboardInterrupt
            solve(self, block)

        patched.setattr(TinyCalibratedQuantizer, "solve_block", interrupted)
        result = cli("quantize", language, tmp_path / "out", *flags)
    assert result.code == 130
    assert said in result.err
    assert not (tmp_path / "out").exists()
    assert cli("quantize", language, tmp_path / "out", *flags).code == 0
    loaded = quantcore.load(tmp_path / "out", lambda: make(Language))
    expected = reference(seqlen=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
