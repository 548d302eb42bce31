"""What the tests of the core share: isolation from installed backends, made-up distributions, child processes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import quantcore
from quantcore.plugins import discovery, manager
from quantcore.quantizers import auto

SUPPORT = Path(__file__).parent / "support"
SOURCE = Path(quantcore.__file__).parents[1]

# Modules with classes that tests pickle or name as "module:Class".
sys.path.insert(0, str(SUPPORT))

RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No environment variable of ours, no installed backend, nothing registered: before each test and after it."""
    for name in [name for name in os.environ if name.startswith("QUANTCORE_")]:
        monkeypatch.delenv(name)
    manager.reset()
    installed = {claim.distribution for group in _groups() for claim in group}
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", ",".join(sorted(installed)))
    configs, quantizers = dict(auto._registered_configs), dict(auto._registered_quantizers)
    manager.reset()
    yield
    auto._registered_configs.clear()
    auto._registered_configs.update(configs)
    auto._registered_quantizers.clear()
    auto._registered_quantizers.update(quantizers)
    manager.reset()


def _groups() -> Iterator[tuple[discovery.Provider, ...]]:
    for group in ("quantcore", "quantcore.match", "quantcore.kernels", "quantcore.containers"):
        yield from discovery.providers(group).values()


@pytest.fixture
def tiny() -> None:
    """The method tiny-int8, registered as a program would register it."""
    module = importlib.import_module("tiny_int8")
    quantcore.register_quantization_config("tiny-int8")(module.TinyInt8Config)
    quantcore.register_quantizer("tiny-int8")(module.TinyInt8Quantizer)


@pytest.fixture
def tiny_calibrated() -> None:
    """The method tiny-calibrated, registered as a program would register it."""
    module = importlib.import_module("tiny_calibrated")
    quantcore.register_quantization_config("tiny-calibrated")(module.TinyCalibratedConfig)
    quantcore.register_quantizer("tiny-calibrated")(module.TinyCalibratedQuantizer)


class TwoLayers(nn.Module):
    """The smallest model with a skip by name, a bias, a norm and two kinds of buffers."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width, dtype=dtype)
        self.norm = nn.LayerNorm(2 * width, dtype=dtype)
        self.second = nn.Linear(2 * width, width, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(width, 3, dtype=dtype)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("angles", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.second(self.norm(self.first(x))))


@pytest.fixture
def build_model() -> Callable[[], TwoLayers]:
    """A function that builds the same small model at every call."""

    def build() -> TwoLayers:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return TwoLayers()

    return build


@pytest.fixture
def child_environment() -> dict[str, str]:
    """The environment of a child process that sees quantcore and the support modules, and no setting of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QUANTCORE_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT, SOURCE)))}


@pytest.fixture
def run_python(tmp_path: Path, child_environment: dict[str, str]) -> RunPython:
    """Runs code in a fresh interpreter with that environment; fails on a non-zero exit."""

    def run(code: str, *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**child_environment, **(env or {})}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return run


class Site:
    """A folder on sys.path in which distributions are made up as pip would install them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: set[str] = set()
        folder.mkdir()

    def install(
        self,
        distribution: str,
        entry_points: Mapping[str, str],
        modules: Mapping[str, str] | None = None,
        *,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
        group: str = "quantcore",
        summary: str = "",
    ) -> None:
        """Put a distribution in place. entry_points: name -> module; modules: name -> source."""
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
        needs += f"Summary: {summary}\n" if summary else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{needs}")
        lines = "".join(f"{name} = {module}\n" for name, module in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for name, source in (modules or {}).items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
            self.modules.add(name)
        importlib.invalidate_caches()
        manager.reset()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty folder of distributions, on sys.path."""
    made = Site(tmp_path / "site")
    monkeypatch.syspath_prepend(made.folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)


def plugin_source(*methods: str, api: int = 1) -> str:
    """The source of a plugin module whose methods are all served by the classes of tiny_int8."""
    backends = ", ".join(
        f"Backend({method!r}, 'tiny_int8:TinyInt8Config', 'tiny_int8:TinyInt8Quantizer', api={api})"
        for method in methods
    )
    return textwrap.dedent(
        f"""
        from quantcore.plugins import Backend, hookimpl

        @hookimpl
        def quantcore_backends():
            return [{backends}]
        """
    )


@pytest.fixture
def plugin() -> Callable[..., str]:
    """Makes the source of a plugin module: plugin("method", api=1)."""
    return plugin_source
