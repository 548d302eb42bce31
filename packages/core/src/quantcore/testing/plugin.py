"""The pytest plugin of the conformance suite; loaded with `-p quantcore.testing.plugin`, never by itself.

A test that asks for `example` runs on every declared example config of every method that is checked, one that asks for
`family_example` on those whose format lowers to a family, one that asks for `backend` on every method. Such a test may
also ask for `dtype`, `device` and `odd_shape`. A test that no method is fit for is not collected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
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
_EXAMPLES = pytest.StashKey[list[tuple[str, Any]]]()  # with the ids of the tests that run on them


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
    config.addinivalue_line("markers", "side_by_side: what other backends in the process may change of a method")
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
    if not {"example", "family_example", "calibrated_example", "backend", "decoding", "compiled_decoding"} & set(asked):
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
    for item in items:
        _expect_gaps(item)


def _expect_gaps(item: pytest.Item) -> None:
    """Mark a test that the method it runs on declares as a gap: it must fail."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    found = [getattr(value, "example", value) for value in values]  # of a decoding
    backends = [getattr(value, "backend", value) for value in found]
    for backend in (each for each in backends if isinstance(each, Backend)):
        for pattern, reason in backend.gaps.items():
            if _matches(pattern, item.name) or item.name.partition("[")[0] == pattern:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def _matches(pattern: str, name: str) -> bool:
    """Whether a name is a pattern, in which `*` alone stands for any text: names of tests have brackets."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


@pytest.fixture(autouse=True)
def _kernels_serve_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests compare what a kernel gives; on trial a wrong one would be replaced by the reference, and pass."""
    from quantcore.kernels import dispatch

    monkeypatch.setattr(dispatch, "_is_foreign", lambda kernel, weight_format: False)


@pytest.fixture(scope="session")
def interpreted(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What fails in Triton's interpreter, by method, of each of its decoders: one process for all, and all workers."""
    from filelock import FileLock  # which torch brings

    from quantcore.testing.decoders import interpreter_faults

    folder = tmp_path_factory.getbasetemp()
    kept = (folder.parent if hasattr(pytestconfig, "workerinput") else folder) / "interpreted.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            methods = [backend.method for backend in pytestconfig.stash[_BACKENDS]]
            kept.write_text(json.dumps(interpreter_faults(methods)))
    return json.loads(kept.read_text())


def _backends(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    for backend in config.stash[_BACKENDS]:
        yield backend.method, backend


def _examples(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    from quantcore.testing.subjects import Example

    if _EXAMPLES not in config.stash:  # tests share an example, and what was made of it
        config.stash[_EXAMPLES] = [
            (f"{backend.method}:{_label(settings)}", Example(backend, {**settings, "quant_method": backend.method}))
            for backend in config.stash[_BACKENDS]
            for settings in backend.example_configs
        ]
    yield from config.stash[_EXAMPLES]


def _label(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()) or "default"


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


def _decodings(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    yield from _of_kernels(config, "decodings")


def _compiled_decodings(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    yield from _of_kernels(config, "compiled")


def _of_kernels(config: pytest.Config, which: str) -> Iterator[tuple[str, Any]]:
    """Decoders of each method's kernels; none where triton has no build for the platform."""
    if find_spec("triton") is None:
        return
    from quantcore.testing import decoders

    for backend in config.stash[_BACKENDS]:
        for decoding in getattr(decoders, which)(backend):
            yield f"{backend.method}-{decoding.kernel}-{decoding.number}", decoding


def _decoder_checks(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    from quantcore.testing.decoders import CHECKS

    yield from ((name, name) for name in CHECKS)


def _gpu_targets(config: pytest.Config) -> Iterator[tuple[str, Any]]:
    from quantcore.kernels.triton.aot import TARGETS

    yield from ((target, target) for target in TARGETS)


def _lowers(example: Any) -> bool:
    from quantcore.testing.subjects import make_linear

    try:
        weight_format = example.weight_format(make_linear())
        return weight_format.family is not None and weight_format.transform is None
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
    "decoding": _decodings,
    "compiled_decoding": _compiled_decodings,
    "decoder_check": _decoder_checks,
    "gpu_target": _gpu_targets,
    "device": _devices,
    "dtype": _dtypes,
    "odd_shape": _odd_shapes,
}
