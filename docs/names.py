"""Writes the names of the distributions, and who has which method, wherever they stand; `--check` only compares.

Both are kept in `quantcore.plugins.known` alone. python docs/names.py [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from quantcore.distribution import BACKENDS, DISTRIBUTION, FOLDERS, REQUIREMENT, distribution_of
from quantcore.plugins.known import KNOWN_METHODS

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "core"
PLUGIN_FILES = (
    CORE / "src" / "quantcore" / "cli" / "templates" / "plugin" / "pyproject.toml.txt",
    ROOT / "tests" / "third_party" / "quantcore-plugin-rowint8" / "pyproject.toml",
    ROOT / "docs" / "write-a-method.md",
)


def methods_of(extra: str) -> list[str]:
    """The methods that a backend has."""
    return [name for name, known in KNOWN_METHODS.items() if known.extra == extra and known.is_available]


def changes() -> Iterator[tuple[Path, str, str]]:
    """A file, the expression of what is replaced in it, and by what."""
    yield CORE / "pyproject.toml", r'(?m)^name = ".*"$', f'name = "{DISTRIBUTION}"'
    yield CORE / "pyproject.toml", r'"[\w-]+\[transformers\]"', f'"{DISTRIBUTION}[transformers]"'
    everything = ",".join((*BACKENDS, "transformers"))
    yield CORE / "pyproject.toml", r"(?m)^all = .*$", f'all = ["{DISTRIBUTION}[{everything}]"]'
    for extra in FOLDERS:
        name = distribution_of(extra)
        folder = ROOT / "packages" / FOLDERS[extra]
        yield CORE / "pyproject.toml", rf"(?m)^{extra} = .*$", f'{extra} = ["{name}"]'
        yield folder / "pyproject.toml", r'(?m)^name = ".*"$', f'name = "{name}"'
        yield folder / "pyproject.toml", r"(?m)^dependencies = .*$", f'dependencies = ["{REQUIREMENT}"]'
        yield folder / "README.md", r"\A# .*", f"# {name}"
    for extra in BACKENDS:
        name = distribution_of(extra)
        row = f"| `{extra}` | {name} | {', '.join(methods_of(extra))} |"
        yield CORE / "README.md", rf"(?m)^\| `{extra}` \|.*$", row
        link = f"[packages/backend-{extra}](packages/backend-{extra})"
        yield ROOT / "README.md", rf"(?m)^\| {re.escape(link)} \| `[\w-]+` \|", f"| {link} | `{name}` |"
    yield CORE / "README.md", r"\A# .*", f"# {DISTRIBUTION}"
    link = "[packages/core](packages/core)"
    yield ROOT / "README.md", rf"(?m)^\| {re.escape(link)} \| `[\w-]+` \|", f"| {link} | `{DISTRIBUTION}` |"
    for path in PLUGIN_FILES:
        yield path, r"(?m)^dependencies = .*$", f'dependencies = ["{DISTRIBUTION}"]'


def made() -> dict[Path, str]:
    """The text that each file is to have. Raises ValueError for a file without the place where a name belongs."""
    texts: dict[Path, str] = {}
    for path, pattern, name in changes():
        text, count = re.subn(pattern, name.replace("\\", r"\\"), texts.get(path) or path.read_text())
        if not count:
            raise ValueError(f"{path}: nothing matches {pattern}")
        texts[path] = text
    return texts


def main() -> int:
    stale = {path: text for path, text in made().items() if path.read_text() != text}
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: a name is out of date; run python docs/names.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
