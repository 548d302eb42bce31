"""A newcomer's hour: the pages in order, twice in one checkout, then mistakes. `nox -s newcomer` runs it on wheels.

python tests/newcomer.py [--pages README.md docs/tutorial.md ...] [--mistakes] [--notebook] [--wheels dist]; without
any, pages, notebook and mistakes on what is installed. It runs in a folder of its own, with a link to examples/, so
that nothing is found that a page does not make. With --wheels each page gets the packages that it says to install,
those alone, from that folder; else lines that install are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "support"))
import pages
import psutil

ROOT = pages.ROOT
MODEL = "examples/stdlib-lm"
TEXT = f"{MODEL}/eval.txt"
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
NAME = re.compile(r'(?m)^name = "(.+)"$')
FIRST_RESULT = 60  # seconds from the start of the demo to its first row, as the README promises
OURS = {
    str(path.parent.relative_to(ROOT)): NAME.findall(path.read_text())[0]
    for path in ROOT.glob("packages/*/pyproject.toml")
}
# What is found in the folder, beside examples/ and what the pages make.
FILES = {
    "broken_plugin.py": "import a_package_that_is_nowhere\n",
    "empty.txt": "",
    "hqq.json": '{"quant_method": "hqq", "nbits": 4}',
    "plain/notes.txt": "no model\n",
    "without_tokenizer/config.json": (ROOT / MODEL / "config.json").read_text(),
}


class Mistake(NamedTuple):
    line: str  # what is typed after `quantcore`
    code: int
    says: str  # a part of what is answered
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed


MISTAKES = (
    Mistake("quantise", 2, "did you mean quantize?"),
    Mistake("list --jsn", 2, "did you mean --json?"),
    Mistake(f"quantize {MODEL} made/x", 2, "--method"),
    Mistake(f"quantize {MODEL} --method hqq", 2, "OUT"),
    Mistake(f"quantize {MODEL} made/x --method hqqq", 2, "hqq"),
    Mistake(f"quantize {MODEL} made/x --method nf4", 2, "--bnb-4bit-quant-type nf4"),
    Mistake(f"quantize {MODEL} made/x --method hqq --bits 4", 2, "did you mean --nbits?"),
    Mistake(f"quantize {MODEL} made/x --method gguf --bits 4", 2, "has no setting of bits, but --type Q4_K"),
    Mistake(f"quantize {MODEL} made/x --method hqq --nbits 4 --group-size 7", 2, "--group-size must"),
    Mistake("quantize examples/stdlib-ml made/x --method hqq", 1, "did you mean examples/stdlib-lm?"),
    Mistake("quantize ./stdlib-lm made/x --method hqq", 1, "does not exist"),
    Mistake(f"quantize {MODEL} {MODEL} --method hqq", 1, "exists; choose another folder"),
    Mistake(f"quantize {MODEL} {MODEL} --method hqq --dry-run", 1, "exists; choose another folder"),
    Mistake(f"quantize {MODEL} {MODEL} --method hqq --force", 1, "is or holds the input"),
    Mistake(f"quantize {MODEL} made/x --method hqq --device abacus", 2, "'abacus' is no device"),
    Mistake(f"quantize {MODEL} made/x --method hqq --device cuda:99", 1, "--device"),
    Mistake(f"quantize {MODEL} made/x --method hqq --calibration {TEXT}", 2, "takes no calibration data"),
    Mistake(f"quantize {MODEL} --method hqq --samples 8 --dry-run", 2, "takes no calibration data"),
    Mistake(f"quantize {MODEL} made/x --method gptq", 2, "--calibration is missing"),
    Mistake(f"quantize {MODEL} made/x --method gptq --calibration none.txt", 1, "none.txt"),
    Mistake(f"quantize {MODEL} made/x --method hqq --max-shard-size big", 1, "--max-shard-size"),
    Mistake(f"quantize {MODEL} made/x --method hqq --config none.json", 2, "cannot read none.json"),
    Mistake(f"quantize {MODEL} made/x --method bitsandbytes --load-in-4bit --load-in-8bit", 2, "--load-in-8bit"),
    Mistake(
        f"quantize {MODEL} --method bitsandbytes --load-in-8bit --bnb-4bit-quant-type nf4 -n", 0, "changes nothing"
    ),
    Mistake(f"convert {MODEL} made/x --to awq", 1, "is not quantized"),
    Mistake(f"convert {MODEL} made/x", 2, "--to-float"),
    Mistake(f"convert {MODEL} made/x --to-float --allow-lossy", 2, "--allow-lossy"),
    Mistake("inspect nowhere", 1, "nowhere does not exist"),
    Mistake(f"inspect {TEXT}", 1, "is a file"),
    Mistake(f"eval {MODEL} --text none.txt", 1, "none.txt"),
    Mistake(f"eval {MODEL} --text {TEXT} --window 0", 2, "--window"),
    Mistake(f"eval {MODEL} --text {TEXT} --max-tokens 1", 2, "--max-tokens"),
    Mistake(f"eval nowhere --text {TEXT}", 1, "nowhere does not exist"),
    Mistake(f"compare {MODEL} --text {TEXT}", 2, "nothing to compare with"),
    Mistake(f"compare {MODEL} nowhere --text {TEXT}", 1, "nowhere does not exist"),
    Mistake(f"recommend {MODEL} --memory lots", 2, "--memory"),
    Mistake("bench --method hqq --shapes 8", 2, "no list of shapes"),
    Mistake("bench --method hqq --device abacus", 2, "'abacus' is no device"),
    Mistake("new-backend 9x", 2, "'9x' cannot name a Python package"),
    Mistake("check nobody", 2, "nobody"),
    Mistake("", 2, "Usage: quantcore"),
    Mistake("list hqqq", 2, "hqqq"),
    Mistake(f"quantize {MODEL} made/x --method bf16", 2, "bf16 is a dtype of float weights"),
    Mistake(f"quantize {MODEL} made/x --method w4", 2, "--method hqq --nbits 4"),
    Mistake(f"quantize {MODEL} made/x --method exl2", 2, "'exl2' is unknown"),
    Mistake(f"quantize {TEXT} made/x --method hqq", 1, "is a file"),
    Mistake("quantize plain made/x --method hqq", 1, "is this the right folder?"),
    Mistake("quantize some/model made/x --method hqq", 1, "some/model"),
    Mistake(f"quantize {MODEL} made/x --method gptq --calibration empty.txt", 1, "calibration text has 0 tokens"),
    Mistake(f"quantize {MODEL} made/x --method gptq --calibration {TEXT} --samples 0", 2, "--samples"),
    Mistake(f"quantize {MODEL} made/x --method gptq --dataset nosuchset", 2, "wikitext2"),
    Mistake(f"quantize {MODEL} made/x --config hqq.json --nbits 3", 2, "--nbits cannot be set beside --config"),
    Mistake(f"quantize made/x {MODEL} --method hqq", 1, "IN comes first, then OUT"),
    Mistake(f"quantize {MODEL} made/x --method q4_k_m", 2, "--method gguf --type Q4_K_M"),
    Mistake("run without_tokenizer hello", 1, "copy the model's tokenizer there"),
    Mistake("serve nowhere", 1, "nowhere does not exist"),
    Mistake(f"serve {MODEL} --port 99999", 2, "--port"),
    Mistake(f"eval {MODEL}", 2, "--text"),
    Mistake(f"eval {MODEL} --text empty.txt", 1, "longer text"),
    Mistake("run nowhere hello", 1, "nowhere does not exist"),
    Mistake(f"run {MODEL} hello --max-tokens 0", 2, "--max-tokens"),
    Mistake(f"compare {MODEL} --config none.json --text {TEXT}", 2, "cannot read none.json"),
    Mistake("bench --method nobody", 2, "'nobody' is unknown"),
    Mistake("doctor --josn", 2, "did you mean --json?"),
    Mistake("new-backend hqq", 2, "hqq is a method already"),
    Mistake("new-backend mine plain", 1, "plain exists"),
    Mistake(f"quantize {MODEL} made/x --method 4bit", 2, "--method hqq --nbits 4"),
    Mistake(f"quantize {MODEL} made/x --method gptq --calibration {MODEL}", 1, "--calibration"),
    Mistake(f"quantize {MODEL} --method gptq --calibration {TEXT} --max-memory lots -n", 2, "--max-memory"),
    Mistake(f"quantize {MODEL} --method gptq --calibration {TEXT} --seqlen 4096 -n", 2, "--seqlen: 4096 is more than"),
    Mistake(f"quantize {MODEL} made/x --method gptq --calibration {TEXT} --resume {TEXT}", 2, "--resume"),
    Mistake(f"eval {MODEL} --text {TEXT} --window 4096 --max-tokens 8192", 1, "--window 4096 is more than"),
    Mistake(f"compare {MODEL} {TEXT} --text {TEXT}", 1, "is a file"),
    Mistake("list", 0, "nothing_there", {"QUANTCORE_PLUGINS": "nothing_there"}),
    Mistake("list", 0, "a_package_that_is_nowhere", {"QUANTCORE_PLUGINS": "broken_plugin", "PYTHONPATH": "."}),
)


def main() -> int:
    given, count = arguments(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        furnish(folder)
        for fault in faults(given, folder):  # each as soon as it is found: the walk is long
            print(fault, flush=True)
            count += 1
    print(f"{count} faults")
    return 1 if count else 0


def faults(given: argparse.Namespace, folder: Path) -> Iterator[str]:
    """What does not go as the pages say, in the order of the walk."""
    wants_all = not (given.pages or given.mistakes or given.notebook)
    shell = from_wheels(given.wheels.resolve()) if given.wheels else pages.without_set_up
    if given.wheels and wants_all:
        yield from demo(folder)
    for page in 2 * (given.pages or list(pages.PAGES if wants_all else ())):  # the second time, what it makes is there
        yield from pages.walk(page, folder, shell)
    if given.notebook or wants_all:
        yield from notebook(folder)
    for mistake in MISTAKES if given.mistakes or wants_all else ():
        yield from told(mistake, folder)


def furnish(folder: Path) -> None:
    """What a newcomer finds: the examples, and files with which mistakes are made."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for path, text in FILES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)


def from_wheels(wheels: Path) -> Callable[[str], str]:
    """What is run for lines of a page: those that install packages of a checkout install the wheels of those alone."""
    uninstall = f"python -m pip uninstall --quiet --yes {' '.join(OURS.values())}"
    install = f"python -m pip install --quiet --find-links {shlex.quote(str(wheels))}"

    def line_for(line: str) -> str:
        if "./packages/" in line and line.startswith("python -m pip install"):
            return f"{uninstall}; {install} {' '.join(map(wheel_of, shlex.split(line)[4:]))}"
        if line.startswith("python -m pip install ."):  # a package that the page makes
            return f"{install}{line.removeprefix('python -m pip install')}"
        return "" if pages.SET_UP.match(line) else line

    return lambda script: "\n".join(map(line_for, script.splitlines()))


def wheel_of(requirement: str) -> str:
    """The distribution of a folder, quoted for a shell: './packages/core[peft]' gives 'quantcore-hub[peft]'."""
    folder, bracket, extras = requirement.removeprefix("./").partition("[")
    return shlex.quote(f"{OURS[folder]}{bracket}{extras}")


def demo(folder: Path) -> Iterator[str]:
    """Runs the front page's first command. Gives what went wrong: a method that fails, a first row that comes late.

    What counts are seconds of a processor: those of a clock depend on what else the machine does.
    """
    command = [sys.executable, "-u", ROOT / "examples" / "demo.py"]
    first = float("inf")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("none: float"):
                first = processor_seconds(process.pid)
            print(line, end="", flush=True)
    if process.returncode:
        yield f"examples/demo.py ends with {process.returncode}"
    if first > FIRST_RESULT:
        yield f"examples/demo.py: the first row after {first:.0f} s of a processor, expected {FIRST_RESULT} at most"


def processor_seconds(process: int) -> float:
    """What a process and those that it started have spent so far."""
    parent = psutil.Process(process)
    spent = [each.cpu_times() for each in (parent, *parent.children(recursive=True))]
    return sum(times.user + times.system for times in spent)


def notebook(folder: Path) -> Iterator[str]:
    """Runs the cells of the tour."""
    start = time.perf_counter()
    yield from pages.run_notebook(NOTEBOOK, folder)
    print(f"{NOTEBOOK.name}: {time.perf_counter() - start:.1f} s")


def told(mistake: Mistake, folder: Path) -> Iterator[str]:
    """Makes a mistake. Gives what is wrong with the answer: another status, no word of the cause, a traceback."""
    # No hub: what is typed wrong must be told without one.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **mistake.environment}
    command = [sys.executable, "-m", "quantcore.cli", *mistake.line.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    print(f"quantcore {mistake.line}", flush=True)
    answer = done.stdout + done.stderr
    if done.returncode != mistake.code or mistake.says not in answer or "Traceback" in answer:
        yield f"quantcore {mistake.line}: ends with {done.returncode}, expected {mistake}\n{done.stderr[-1500:]}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Walk through the pages as a newcomer does, and make mistakes.")
    parser.add_argument("--pages", nargs="*", default=[], help=f"to walk through [default: {' '.join(pages.PAGES)}]")
    parser.add_argument("--mistakes", action="store_true", help="make the mistakes")
    parser.add_argument("--notebook", action="store_true", help="run the cells of the tour")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels, from which pages get what they install")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
