"""What is carried to OUT beside weights: terms of use, and a card that says what was done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcore.cli.model_card import Made, card, note_quality
from quantcore.cli.output import in_bytes, pages
from quantcore.cli.progress import _Lines

Cli = Callable[..., Any]
ORIGINAL = """---
license: apache-2.0
tags:
- code
base_model: org/older
datasets:
- some
---
A model that was trained.
"""


def made(**fields: Any) -> Made:
    given = {"target": Path("out"), "source": "org/name", "method": "hqq", "config": {"nbits": 4, "axis": None}}
    return Made(**{**given, "bytes": 4_000_000, "bytes_before": 11_000_000, **fields})


def test_terms_of_use_and_a_card_are_carried_along(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (source / name).write_text(f"text of {name}")
    (source / "README.md").write_text(ORIGINAL)
    assert cli("quantize", source, tmp_path / "out", "--method", method).code == 0
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "text of NOTICE.txt"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The terms of the original hold: LICENSE, NOTICE.txt, USE_POLICY.md." in text
    assert f"| method | `{method}` |" in text
    assert text.endswith("# Card of float\n\nA model that was trained.\n")
    assert cli("convert", tmp_path / "out", tmp_path / "back", "--to-float").code == 0
    assert "float weights" in (tmp_path / "back" / "README.md").read_text()
    assert (tmp_path / "back" / "LICENSE").exists()


def test_the_header_keeps_the_license_and_names_the_source() -> None:
    header = card(made(), ORIGINAL).split("---")[1]
    assert "license: apache-2.0\n" in header
    assert "datasets:\n- some\n" in header
    assert "base_model: org/name\nbase_model_relation: quantized\ntags:\n- quantcore\n- hqq\n" in header
    assert "org/older" not in header


def test_a_card_says_settings_sizes_data_and_how_to_load() -> None:
    text = card(made(data="calibration.txt: 16 rows, 2,048 tokens", bits_per_weight=4.5))
    assert '| settings | `{"nbits": 4}` |' in text
    assert "| calibration data | calibration.txt: 16 rows, 2,048 tokens |" in text
    assert "| files of weights | 4.00 MB, of the source 11.0 MB |" in text
    assert "| quality | not measured;" in text
    assert "model = quantcore.load('out')" in text


def test_a_measurement_is_put_into_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(made()))
    note_quality(tmp_path, "perplexity 18.4")
    note_quality(tmp_path, "perplexity 18.5")
    assert (tmp_path / "README.md").read_text().count("| quality | perplexity 18.5 |") == 1
    assert os.listdir(tmp_path) == ["README.md"]


def test_a_folder_without_our_card_gets_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no card that quantcore wrote"):
        note_quality(tmp_path, "perplexity 18.4")


def test_the_size_that_is_printed_is_that_of_the_files(cli: Cli, method: str, source: Path, tmp_path: Path) -> None:
    last = cli("quantize", source, tmp_path / "out", "--method", method).out.splitlines()[-1]
    size, before = ((path / "model.safetensors").stat().st_size for path in (tmp_path / "out", source))
    assert f": {in_bytes(size)}, was {in_bytes(before)}, in " in last
    assert f"files of weights: {in_bytes(size)}" in cli("inspect", tmp_path / "out").out


def test_json_puts_on_one_line_what_fits_there() -> None:
    data = {"shape": [4096, 4096], "layers": {f"layers.{number}": {"bits": 4} for number in range(9)}, "empty": []}
    text = pages(data)
    assert json.loads(text) == data
    assert '  "shape": [4096, 4096],' in text.splitlines()
    assert '    "layers.3": {"bits": 4},' in text.splitlines()
    assert max(map(len, text.splitlines())) <= 100


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    lines: list[str] = []
    times = iter([0.0, 1.0, 12.0, 13.0, 90.0])
    update = _Lines(lines.append, lambda: next(times))
    for done, label in ((1, "a"), (2, "b"), (3, "c"), (10, "d")):
        update(done, 10, label)
    assert lines == ["20 % after 0:12, about 0:48 left: b", "100 % after 1:30: d"]


@pytest.mark.parametrize("words", [["-m", "NAME"], ["-mNAME"]], ids=["apart", "glued"])
def test_short_flags_do_what_the_long_ones_do(cli: Cli, method: str, source: Path, words: list[str]) -> None:
    chosen = [word.replace("NAME", method) for word in words]
    result = cli("quantize", source, *chosen, "-n", "-q", "--threshold", "2.5")
    assert result.code == 0
    assert result.out.strip().isdigit()
