"""What the documents show is what the code does: their blocks run, and the files they quote are those files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pages
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
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", pages.PAGES)
def test_blocks_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert list(pages.walk(page, tmp_path)) == []


def test_every_page_that_has_blocks_is_walked_through() -> None:
    written = ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    found = {page for page in written if any(block.kind in ("python", "sh") for block in pages.blocks(page))}
    assert found == {*pages.PAGES, *pages.NOT_WALKED}


def test_cells_of_the_notebook_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    assert list(pages.run_notebook(NOTEBOOK, tmp_path)) == []


def test_notebook_holds_no_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


WRITTEN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "packages").glob("*/README.md"))]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(SHELL.findall(page.read_text())).splitlines()
    for words in (shlex.split(line.rstrip("& "), comments=True) for line in lines if line.startswith("quantcore ")):
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
