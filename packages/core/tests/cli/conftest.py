"""What the tests of the command line share: a runner, a served method, a float and a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

import quantcore
from quantcore.cli import main
from quantcore.plugins import manager


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process: cli("list", "--json")."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args], prog_name="quantcore")
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method that is served: the name of it."""
    monkeypatch.setenv("QUANTCORE_PLUGINS", "tiny_int8")
    manager.reset()
    return "tiny-int8"


@pytest.fixture
def source(tmp_path: Path, build_model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float checkpoint folder, whose architecture is the small model."""
    folder = tmp_path / "float"
    quantcore.save(build_model(), folder)
    (folder / "config.json").write_text('{"architectures": ["TwoLayers"]}')
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("quantcore.integrations.transformers.build_model", lambda directory: build_model())
    return folder


@pytest.fixture
def quantized(cli: Callable[..., Result], method: str, source: Path, tmp_path: Path) -> Path:
    """The same model quantized."""
    target = tmp_path / "quantized"
    assert cli("quantize", source, target, "--method", method).code == 0
    return target
