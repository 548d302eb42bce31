"""The pytest plugin of the conformance suite; loaded with `-p quantcore.testing.plugin`, never by itself.

A test that asks for `example` runs on every declared example config of every method that is checked, one that asks for
`family_example` on those whose format lowers to a family, one that asks for `backend` on every method. Such a test may
also ask for `dtype`, `device` and `odd_shape`. A test that no method is fit for is not collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from quantcore.errors import QuantcoreError
from quantcore.plugins.backend import Backend
from quantcore.plugins.discovery import methods
from quantcore.plugins.manager import plugins
from quantcore.testing import THEMES

pytest.register_assert_rewrite(*(f"quantcore.testing.conformance_{theme}" for theme in THEMES))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SHAPES = {
    "one_row": (1, 256),
    "one_column": (64, 1),
    "one_weight": (1, 1),
    "ragged_groups": (96, 80),
    "primes": (7, 5),
}
_BACKENDS = pytest.StashKey[list[Backend]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("quantcore").addoption(
        "--quantcore-method",
        action="append",
        default=[],
        metavar="NAME",
        help="method that the conformance suite checks; may be repeated (default: every installed method)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "conformance_*.py")
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselect with -m 'not slow'")
    names = config.getoption("--quantcore-method") or [info.method for info in methods() if info.installed]
    if not names:
        raise pytest.UsageError(
            "no method is installed to be checked; install one, or name its module in QUANTCORE_PLUGINS"
        )
    try:
        config.stash[_BACKENDS] = [plugins().backend(name) for name in names]
    except QuantcoreError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.fixturenames
    if not {"example", "family_example", "calibrated_example", "backend"} & set(asked):
        return
    for name, values in _AXES.items():
        if name in asked:
            pairs = list(values(metafunc.config))
            metafunc.parametrize(name, [value for _, value in pairs], ids=[label for label, _ in pairs])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has no method to run on, which pytest would count as skipped."""
    reasons = {item: [str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip")] for item in items}
    empty = [item for item in items if any("empty parameter set" in reason for reason in reasons[item])]
    config.hook.pytest_deselected(items=empty)
    items[:] = [item for item in items if item not in empty]


def _backends(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    for backend in config.stash[_BACKENDS]:
        yield backend.method, backend


def _examples(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    from quantcore.testing.subjects import Example

    for backend in config.stash[_BACKENDS]:
        for settings in backend.example_configs:
            label = ",".join(f"{key}={value}" for key, value in settings.items()) or "default"
            yield f"{backend.method}:{label}", Example(backend, {**settings, "quant_method": backend.method})


def _family_examples(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    for label, example in _examples(config):
        if _lowers(example):
            yield label, example


def _calibrated_examples(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    for label, example in _examples(config):
        if _calibrates(example):
            yield label, example


def _calibrates(example: Any) -> bool:
    try:
        return bool(getattr(example.quantizer(), "needs_data", False))
    except Exception:  # noqa: BLE001 - as in `_lowers`
        return False


def _lowers(example: Any) -> bool:
    from quantcore.testing.subjects import make_linear

    try:
        return example.weight_format(make_linear()).family is not None
    except Exception:  # noqa: BLE001 - a broken method fails in its own tests, not in the collection of all
        return True


def _dtypes(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    for dtype in DTYPES:
        yield str(dtype).removeprefix("torch."), dtype


def _devices(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    yield "cpu", torch.device("cpu")
    if torch.cuda.is_available():
        yield "cuda", torch.device("cuda")


def _odd_shapes(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    yield from ODD_SHAPES.items()


_AXES: dict[str, Callable[[pytest.Config], Iterator[tuple[str, Any]]]] = {
    "backend": _backends,
    "example": _examples,
    "family_example": _family_examples,
    "calibrated_example": _calibrated_examples,
    "device": _devices,
    "dtype": _dtypes,
    "odd_shape": _odd_shapes,
}
