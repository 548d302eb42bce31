"""What the documents show is what the code does: their blocks run, and the files they quote are those files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "third_party" / "quantcore-plugin-rowint8"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
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
