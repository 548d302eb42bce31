"""`quantcore new-backend`: a package that is a method as it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_package_is_a_method_that_quantizes_and_passes_its_tests(cli: Cli, tmp_path: Path) -> None:
    result = cli("new-backend", "tiny_method", tmp_path / "made", "--json")
    assert result.code == 0
    assert all((tmp_path / "made" / file).is_file() for file in json.loads(result.out)["files"])
    path = os.pathsep.join([str(tmp_path / "made"), os.environ.get("PYTHONPATH", "")])
    code = "import sys; from quantcore.testing import run; sys.exit(run('tiny_method', themes=['config', 'layer']))"
    settings = {**os.environ, "PYTHONPATH": path, "QUANTCORE_PLUGINS": "tiny_method", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout


def test_names_of_classes_and_package_follow_the_method(cli: Cli, tmp_path: Path) -> None:
    cli("new-backend", "two_words", tmp_path / "made")
    code = (tmp_path / "made" / "two_words" / "method.py").read_text()
    assert "class TwoWordsConfig(" in code
    assert "rowint8" not in "".join(path.read_text().lower() for path in (tmp_path / "made").rglob("*.*"))


def test_folder_that_exists_is_kept(cli: Cli, tmp_path: Path) -> None:
    result = cli("new-backend", "tiny_method", tmp_path)
    assert result.code == 1
    assert result.err == f"Error: {tmp_path} exists; choose another folder\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Tiny-Method", "cannot name a Python package"),
        ("class", "cannot name a Python package"),
        ("json", "a Python package json is installed already"),
        ("gptq", "gptq is a method already"),
    ],
)
def test_name_that_cannot_be_is_a_usage_error(cli: Cli, name: str, reason: str, tmp_path: Path) -> None:
    result = cli("new-backend", name, tmp_path / "made")
    assert result.code == 2
    assert reason in result.err
    assert not (tmp_path / "made").exists()


def test_folder_that_cannot_be_written_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cli("new-backend", "tiny_method", tmp_path / "file" / "made")
    assert result.code == 1
    assert result.err.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
