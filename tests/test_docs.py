"""What the documents show is what the code does: their blocks run, and the files they quote are those files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import quantcore
from quantcore.calibration import report_of
from quantcore.calibration.data import Calibration
from quantcore.cli import VERBS
from quantcore.nn import QuantizedEmbedding
from quantcore.plugins.backend import import_string

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "third_party" / "quantcore-plugin-rowint8"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "examples").symlink_to(ROOT / "examples")
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_blocks_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    done = run("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr


HOW_TO = BLOCK.findall((ROOT / "docs" / "how-to.md").read_text())


@pytest.mark.parametrize("number", range(len(HOW_TO)))
def test_each_block_of_the_how_to_runs_on_its_own(number: int, tmp_path: Path) -> None:
    done = run(HOW_TO[number], tmp_path)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "packages").glob("*/README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(SHELL.findall(page.read_text())).splitlines()
    for words in (shlex.split(line, comments=True) for line in lines if line.startswith("quantcore ")):
        command: click.Command = import_string(VERBS[words[1]].target)
        command.make_context(words[1], words[2:])


def test_sketches_of_the_page_for_authors_run() -> None:
    """Its blocks that quote no file: an embedding, and a method with a solver, here one that rounds."""
    text = QUOTED.sub("", (ROOT / "docs" / "write-a-method.md").read_text())
    names: dict[str, Any] = {"quantcore": quantcore}
    exec((PLUGIN / "rowint8" / "method.py").read_text(), names)  # noqa: S102  # of this repository
    names["config"] = names["RowInt8"]()
    names["solve"] = lambda weight, hessian: (names["RowInt8"]().quantize(weight), float(hessian.trace()))
    names["model"] = quantcore.load(ROOT / "examples" / "stdlib-lm")
    for block in BLOCK.findall(text):
        exec(block, names)  # noqa: S102  # of this repository
    assert isinstance(names["model"].model.embed_tokens, QuantizedEmbedding)
    quantizer, model = names["MyQuantizer"](names["RowInt8Config"]()), quantcore.load(ROOT / "examples" / "stdlib-lm")
    quantizer.calibrate_model(model, Calibration.of(torch.arange(64).view(2, 32)))
    assert {row.method for row in report_of(model).layers} == {"rowint8"}


def test_the_quoted_plugin_is_the_tested_one() -> None:
    quoted = dict(QUOTED.findall((ROOT / "docs" / "write-a-method.md").read_text()))
    assert set(quoted) == {"pyproject.toml", "rowint8/__init__.py", "rowint8/method.py"}
    for name, text in quoted.items():
        assert text == (PLUGIN / name).read_text(), name


def test_plugin_that_new_backend_writes_is_the_quoted_one() -> None:
    templates = ROOT / "packages" / "core" / "src" / "quantcore" / "cli" / "templates" / "plugin"
    for name in ("pyproject.toml", "rowint8/__init__.py", "rowint8/method.py"):
        assert (templates / f"{Path(name).name}.txt").read_text() == (PLUGIN / name).read_text(), name


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
