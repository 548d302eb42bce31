"""The front page says what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import quantcore
from quantcore.plugins.manager import plugins

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("method", [info.method for info in quantcore.methods() if info.installed])
def test_every_method_says_what_it_is_good_for(method: str) -> None:
    guide = plugins().backend(method).guide
    assert guide.purposes
    assert guide.pros
    assert guide.cons


def test_table_and_guide_of_methods_are_the_generated_ones() -> None:
    script = ROOT / "docs" / "methods_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def test_commands_of_the_front_page_are_those_of_nox() -> None:
    text = (ROOT / "README.md").read_text()
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && nox -s {session}\n" in text
        assert f"def {session}(" in (ROOT / "noxfile.py").read_text()
