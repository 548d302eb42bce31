"""Every check of the repository: a session makes its own environment, installs packages of this checkout, does one job.

nox -s tests                     every set of tests, each in an environment of its own
nox -s "tests(hqq)" -- -k solver one set; the words after -- go to pytest
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint"]

CONSTRAINTS = Path("constraints.txt")
DIST = Path("dist")
THIRD_PARTY = Path("tests/third_party")

# A backend per row: the folder packages/backend-<name>, the import quantcore_<name>, its methods.
BACKENDS = {
    "bnb": ("bitsandbytes",),
    "fp8": ("fbgemm_fp8", "fp8", "mxfp8"),
    "gptq": ("auto-round", "awq", "gptq"),
    "hqq": ("hqq",),
    "misc": ("compressed-tensors", "quark"),
}
METHODS = [method for methods in BACKENDS.values() for method in methods]

CORE = "packages/core"
PACKAGES = [CORE, *(f"packages/backend-{name}" for name in BACKENDS)]
EVERYTHING = [f"{CORE}[transformers,peft]", *PACKAGES[1:]]
TRANSFORMERS = ("5.12.0", "5.23.0")  # the oldest release that from_pretrained is served in, and the newest tested
WORKERS = ("-n", "logical", "--maxprocesses", "8")
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TEST_TOOLS = ["pytest", "pytest-randomly", "pytest-xdist"]
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers
# What gptqmodel imports on a CPU, besides torch, transformers and what those depend on.
GPTQMODEL_NEEDS = [
    "datasets",
    "defuser",
    "device-smi",
    "dill",
    "jinja2",
    "logbar",
    "ninja",
    "pillow",
    "protobuf",
    "pyarrow",
    "pypcre",
    "threadpoolctl",
    "tokenicer",
    "torchao",
]


class TestSet(NamedTuple):
    """What one environment installs and what runs in it: pytest on paths, then the conformance suite on methods."""

    packages: list[str]
    paths: list[str]
    methods: tuple[str, ...] = ()


TEST_SETS = {
    "core": TestSet([CORE], [f"{CORE}/tests"]),
    **{
        name: TestSet(
            [f"{CORE}[transformers]", f"packages/backend-{name}"], [f"packages/backend-{name}/tests"], methods
        )
        for name, methods in BACKENDS.items()
    },
    "all": TestSet(EVERYTHING, ["tests", f"--ignore={THIRD_PARTY}"]),
    "third_party": TestSet([CORE], [str(path) for path in sorted(THIRD_PARTY.rglob("test_*.py"))], ("rowint8",)),
}


@nox.session
@nox.parametrize("backend", [nox.param(name, id=name) for name in TEST_SETS])
def tests(session: nox.Session, backend: str) -> None:
    """The core alone, each backend alone with the core, what crosses packages, and a stranger's plugin."""
    chosen = TEST_SETS[backend]
    install(session, *chosen.packages, *TEST_TOOLS)
    if backend == "third_party":
        session.install("--force-reinstall", "--no-deps", *build_plugins(session))
    if chosen.paths:
        run_pytest(session, *chosen.paths)
    check(session, *chosen.methods)


@nox.session
def conformance(session: nox.Session) -> None:
    """The conformance suite on every method of this repository, all backends installed side by side."""
    install(session, *PACKAGES, *TEST_TOOLS)
    check(session, *METHODS)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's rules, ruff's format, mypy."""
    install(session, CORE, "mypy", "pytest", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """Quantizes the bundled model with every method that needs no calibration, and prints one table."""
    install(session, *EVERYTHING)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """The examples of docs and front page, with few enough steps for two cores."""
    install(session, *EVERYTHING)
    session.run("python", "examples/use_with_transformers.py")
    session.run("python", "examples/finetune_qlora.py", "--steps", "40", "--eval-tokens", "4096")


@nox.session
@nox.parametrize("version", TRANSFORMERS)
def transformers(session: nox.Session, version: str) -> None:
    """What depends on transformers' loader, in the oldest and the newest release that is served."""
    install_torch(session)
    session.install(*EVERYTHING, f"transformers=={version}", *TEST_TOOLS)  # the pins of the others suit the newest
    run_pytest(session, *(str(path) for path in sorted(Path("tests").glob("test_transformers_*.py"))))


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of every package in dist/; then the session `wheels` installs and imports them."""
    session.install("-c", CONSTRAINTS, "build")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", DIST, package, silent=True)
    session.notify("wheels")


@nox.session(reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """The wheels in dist/ work in a clean environment."""
    files = {path.name.partition("-")[0]: path for path in DIST.glob("*.whl")}
    if not files:
        session.error(f"no wheel in {DIST}; run nox -s build")
    core = files.pop("quantcore")
    install(session, f"{core}[all]", *files.values())
    session.run("python", "-m", "pip", "check")
    session.run("python", "-I", "-c", f"import quantcore, {', '.join(f'quantcore_{name}' for name in BACKENDS)}")
    session.run("quantcore", "list")


@nox.session
def interop(session: nox.Session) -> None:
    """What is saved here loads in stock transformers with the upstream package, with the same outputs."""
    install(session, *EVERYTHING, *TEST_TOOLS, *map(pinned, ("bitsandbytes", "compressed-tensors", "hqq")))
    run_pytest(session, "tests/interop")


@nox.session
def interop_calibrated(session: nox.Session) -> None:
    """What the calibrated methods save loads in stock gptqmodel and auto-round, with the same outputs."""
    install(session, *EVERYTHING, *TEST_TOOLS, pinned("auto-round"), *GPTQMODEL_NEEDS)
    session.install("--no-deps", pinned("gptqmodel"))  # it asks for a newer torch than it needs
    run_pytest(session, "tests/interop_calibrated")


@nox.session
def bench(session: nox.Session) -> None:
    """Speed, memory and error against the upstream packages, in one process run after the other."""
    install(session, *PACKAGES, *map(pinned, ("bitsandbytes", "compressed-tensors", "hqq")))
    for script in sorted(Path("benchmarks").glob("*_vs_upstream.py")):
        session.run("python", script, *session.posargs)


@nox.session
def bench_gpu(session: nox.Session) -> None:
    """The tests that need a GPU, then the speed of every kernel beside torch and upstream, in benchmarks/results."""
    if not any(Path(node).exists() for node in GPU_NODES):
        session.skip(f"no GPU here: neither {' nor '.join(GPU_NODES)} exists")
    install(session, *EVERYTHING, "pytest", pinned("triton"), pinned("bitsandbytes"))
    session.run("python", "-m", "pip", "install", "gemlite", success_codes=[0, 1])  # not built for every GPU
    tests = ("tests", f"--ignore={THIRD_PARTY}", *(f"{package}/tests" for package in PACKAGES))
    session.run("python", "-m", "pytest", "-m", "gpu", *tests)
    session.run("python", "benchmarks/gpu.py", *session.posargs)


def install(session: nox.Session, *requirements: str | Path) -> None:
    """Installs torch, then the requirements under constraints.txt.

    Packages of this checkout that depend on one another go into one call: pip then takes each from its folder and
    asks no index for it.
    """
    install_torch(session)
    session.install("-c", CONSTRAINTS, *requirements)


def install_torch(session: nox.Session) -> None:
    """Installs the pinned torch before anything that depends on it.

    Any build of that version will do, a CPU build of 0.2 GB as well as a CUDA build of several GB. With the version in
    place, `torch>=2.7` in a package's dependencies is met, and pip fetches no other build.
    """
    session.install(pinned("torch"))


def pinned(name: str) -> str:
    """The requirement that constraints.txt gives for a distribution, such as 'torch==2.13.0'."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith(f"{name}=="))


def build_plugins(session: nox.Session) -> list[Path]:
    """Wheels of the plugins in tests/third_party, made as their author would make them."""
    folder = Path(session.create_tmp()) / "plugins"
    shutil.rmtree(folder, ignore_errors=True)
    sources = [path.parent for path in THIRD_PARTY.glob("*/pyproject.toml")]
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *sources)
    return sorted(folder.glob("*.whl"))


def run_pytest(session: nox.Session, *paths: str) -> None:
    """Runs pytest with one worker a core, at most eight; each worker's torch keeps to one thread."""
    session.run("python", "-m", "pytest", *WORKERS, *paths, *session.posargs, env=QUIET)


def check(session: nox.Session, *methods: str) -> None:
    """Runs the conformance suite on each method."""
    for method in methods:
        session.run("quantcore", "check", method, env={**QUIET, "PYTEST_ADDOPTS": " ".join(WORKERS)})
