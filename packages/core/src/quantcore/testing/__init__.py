"""The conformance suite: what every method must do, run by pytest on installed methods.

From Python `run("hqq")`, from a shell `quantcore check hqq`, and beside a plugin's own tests
`pytest -p quantcore.testing.plugin --pyargs quantcore.testing --quantcore-method hqq`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from quantcore.errors import MissingExtraError

THEMES = ("config", "format", "values", "layer", "state", "model", "kinds", "calibration", "damage", "kernels")


def run(*methods: str, verbose: bool = False, themes: Sequence[str] = THEMES) -> int:
    """Run the suite on the methods and return pytest's exit status, 0 when every test passed.

    methods: names; none for every installed method. verbose: a line for each test. themes: the parts of the suite to
    run. Settings of the working folder's pytest are not read; PYTEST_ADDOPTS is.
    Raises ValueError for an unknown theme, MissingExtraError without pytest, and what `Plugins.backend` raises for a
    method that cannot be loaded.
    """
    unknown = sorted(set(themes) - set(THEMES))
    if unknown:
        raise ValueError(f"theme {unknown[0]!r} is unknown; use {', '.join(THEMES)}")
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise MissingExtraError("the conformance suite needs pytest; pip install pytest") from error
    from quantcore.plugins.manager import plugins

    for method in methods:
        plugins().backend(method)
    folder = Path(__file__).parent
    files = [str(folder / f"conformance_{theme}.py") for theme in themes]
    settings = ["-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider", "-p", "quantcore.testing.plugin"]
    report = ["-v", "-rfEs"] if verbose else ["-q", "-rfE", "--no-header"]
    return int(pytest.main([*settings, *report, *(f"--quantcore-method={method}" for method in methods), *files]))
