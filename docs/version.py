"""Moves the version of every package together: python docs/version.py 0.2.0; `--check` says whether all are alike.

What backends ask of the core moves with it: this minor version, or a later one before the next major.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "core" / "src" / "quantcore"
NUMBER = r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?"


def places() -> Iterator[tuple[Path, str]]:
    """Each file that holds the version, with an expression that matches the text before it and then the version."""
    for path in sorted((ROOT / "packages").glob("*/pyproject.toml")):
        yield path, rf'(?m)(^version = ")({NUMBER})'
    yield CORE / "_metadata.py", rf'(return ")({NUMBER})'
    yield ROOT / "docs" / "sdk.md", rf"(### `__version__`\n\n`')({NUMBER})"


def requirement(version: str) -> str:
    """What backends ask of the core of a version: ">=0.2,<1"."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{major + 1}"


def versions() -> dict[Path, str]:
    """The version that each file holds. Raises ValueError for a file without one."""
    found = {}
    for path, expression in places():
        match = re.search(expression, path.read_text())
        if match is None:
            raise ValueError(f"{path.relative_to(ROOT)}: no version in the place where one belongs")
        found[path] = match[2]
    return found


def move(version: str) -> None:
    """Write a version into every file that holds it, and the requirement for the core into the module of names."""
    for path, expression in places():
        path.write_text(re.sub(expression, rf"\g<1>{version}", path.read_text()))
    names = CORE / "distribution.py"
    text = re.sub(r'(REQUIREMENT = f"\{DISTRIBUTION\})[^"]*', rf"\g<1>{requirement(version)}", names.read_text())
    names.write_text(text)
    subprocess.run([sys.executable, ROOT / "docs" / "names.py"], check=True)  # writes the requirement where it belongs


def main() -> int:
    wanted = sys.argv[1:]
    if wanted == ["--check"]:
        found = versions()
        for path, version in found.items() if len(set(found.values())) > 1 else ():
            print(f"{path.relative_to(ROOT)}: {version}", file=sys.stderr)
        return int(len(set(found.values())) > 1)
    if len(wanted) != 1 or not re.fullmatch(NUMBER, wanted[0]):
        print("give one version such as 0.2.0 or 0.2.0rc1, or --check", file=sys.stderr)
        return 2
    move(wanted[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
