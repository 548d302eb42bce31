"""What holds for all tests: the same random numbers in any order, which of them and which kernels this machine runs."""

from __future__ import annotations

import logging
import os
import random
import zlib
from collections.abc import Generator, Iterator
from typing import Any

import pytest

_SEED = int(os.environ.get("QUANTCORE_TEST_SEED", "0"))
"""Another number gives all tests other random numbers."""


def pytest_configure(config: pytest.Config) -> None:
    """Other packages' tests compare bits with plain torch's, which kernels on the same device round otherwise."""
    if not any("kernels-cpu" in argument for argument in config.args):
        os.environ.setdefault("QUANTCORE_DISABLE_PLUGINS", "quantcore_cpu")


def _seed(name: str) -> None:
    import torch

    seed = zlib.crc32(name.encode()) ^ _SEED
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What several tests share is the same whichever of them comes first."""
    if fixturedef.scope != "function":
        _seed(fixturedef.argname)


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> None:
    """Each test draws the same random numbers alone, in any order, and in any run."""
    _seed(request.node.nodeid.rpartition("/")[2])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own: what it leaves under a relative name, no other test finds."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """The command line sends logs to stderr for good; after a test they go where they went."""
    root, own = logging.getLogger(), logging.getLogger("quantcore")
    level = own.level
    yield
    own.setLevel(level)
    for handler in [each for each in root.handlers if type(each).__module__.startswith("quantcore.")]:
        root.removeHandler(handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Output may repeat what a damaged file holds: text that is no Unicode, in which no worker can send a report."""
    report = yield
    report.sections = [(title, _encodable(text)) for title, text in report.sections]
    return report


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no GPU that torch can use")
        for item in marked:
            item.add_marker(skip)
