"""The names of the distributions and the table of methods stand in one place; what is made of them is up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantcore.distribution import BACKENDS
from quantcore.plugins.known import KNOWN_METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "packages"


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def test_metadata_and_pages_have_the_names_of_the_one_place() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "names.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_backend_is_an_extra() -> None:
    assert sorted(f"backend-{extra}" for extra in BACKENDS) == sorted(path.name for path in PACKAGES.glob("backend-*"))


@pytest.mark.parametrize("extra", BACKENDS)
def test_methods_that_are_said_to_be_available_are_those_of_the_backend(extra: str) -> None:
    has = project(PACKAGES / f"backend-{extra}")["entry-points"]["quantcore"]
    said = {name for name, known in KNOWN_METHODS.items() if known.extra == extra and known.is_available}
    assert said == set(has), "set is_available in quantcore.plugins.known, then run python docs/names.py"
