"""Fixtures: every instruction set that this processor runs, each test with one of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantcore_cpu import library

sys.path.insert(0, str(Path(__file__).parent / "support"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", library.available(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use within the test."""
    before = library.isa()
    library.use(request.param)
    yield request.param
    library.use(before)
