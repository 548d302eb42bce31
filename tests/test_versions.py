"""All packages have one version, and one command moves it; the workflows run sessions that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, root / "docs" / "version.py", *arguments], capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that hold a version; the writer of names writes nothing here."""
    package_files = [*(ROOT / "packages").glob("*/pyproject.toml")]
    package_files += [ROOT / "packages/core/src/quantcore" / name for name in ("_metadata.py", "distribution.py")]
    for path in (*package_files, ROOT / "docs" / "version.py", ROOT / "docs" / "sdk.md"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "docs" / "names.py").write_text("")
    return tmp_path


def test_every_package_has_the_same_version() -> None:
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_one_command_moves_every_version_and_what_backends_ask_for(checkout: Path) -> None:
    assert run(checkout, "1.4.0rc1").returncode == 0
    texts = [path.read_text() for path in (checkout / "packages").glob("*/pyproject.toml")]
    assert len(texts) > 5
    assert all(re.search(r'(?m)^version = "1\.4\.0rc1"$', text) for text in texts)
    core = checkout / "packages/core/src/quantcore"
    assert 'return "1.4.0rc1"' in (core / "_metadata.py").read_text()
    assert "`'1.4.0rc1'`" in (checkout / "docs" / "sdk.md").read_text()
    assert 'REQUIREMENT = f"{DISTRIBUTION}>=1.4,<2"' in (core / "distribution.py").read_text()
    assert run(checkout, "--check").returncode == 0


def test_versions_that_differ_are_listed(checkout: Path) -> None:
    path = checkout / "packages" / "core" / "pyproject.toml"
    path.write_text(re.sub(r'(?m)^version = ".*"$', 'version = "9.9.9"', path.read_text()))
    done = run(checkout, "--check")
    assert done.returncode == 1
    assert "packages/core/pyproject.toml: 9.9.9" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("0.2",), ("v0.2.0",), ("0.2.0", "0.3.0")])
def test_what_is_no_version_changes_nothing(arguments: tuple[str, ...], checkout: Path) -> None:
    done = run(checkout, *arguments)
    assert done.returncode == 2
    assert "such as 0.2.0" in done.stderr


def test_workflows_run_sessions_of_the_noxfile() -> None:
    asked = [
        session
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in re.findall(r"run: nox -s (.+)", path.read_text())
        for session in line.split()
    ]
    noxfile = (ROOT / "noxfile.py").read_text()
    assert len(asked) > 4
    assert [session for session in asked if f"\ndef {session}(" not in noxfile] == []
