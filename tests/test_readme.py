"""The front page says what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_table_of_methods_is_the_generated_one() -> None:
    script = ROOT / "docs" / "methods_table.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_commands_of_the_front_page_are_those_of_nox() -> None:
    text = (ROOT / "README.md").read_text()
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && nox -s {session}\n" in text
        assert f"def {session}(" in (ROOT / "noxfile.py").read_text()
