"""Running the pages as a reader does: their blocks in order, Python in one interpreter a page, the rest in a shell.

A shell's block is of the kind `sh`. One of the kind `bash` needs more than the others, and tests/loopback runs it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/tutorial.md", "docs/how-to.md", "docs/large-models.md", "docs/write-a-method.md")
NOT_WALKED = ("docs/release.md",)  # it publishes
STANDING_ALONE = ("docs/how-to.md",)  # each block of it begins anew
BLOCK = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
SET_UP = re.compile(r"^(?:python -m pip install|export|nox|pip) ?.*$", re.MULTILINE)
HANG = 3600  # seconds that only a hang reaches
# What sketches of a page take for granted: the method that the page made before them, a model, a solver.
GIVEN = {
    "docs/write-a-method.md": """
import quantcore
from rowint8.method import RowInt8, RowInt8Config

model, config = quantcore.load("examples/stdlib-lm"), RowInt8()


def solve(weight, hessian):
    return RowInt8().quantize(weight), float(hessian.trace())
"""
}
# Reads blocks as lines of JSON; answers each with a line of JSON, its traceback or nothing.
INTERPRETER = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    block = json.loads(line)
    names = {"__name__": "__main__"} if block["anew"] else names
    try:
        exec(compile(block["text"], block["place"], "exec"), names)
        fault = ""
    except BaseException:
        fault = traceback.format_exc()
    print("\\n" + json.dumps(fault), flush=True)
"""


class Block(NamedTuple):
    place: str  # the page and the line of its fence
    kind: str
    text: str
    file: str | None  # that the block quotes

    @property
    def last_line(self) -> str:
        return next((line.strip() for line in reversed(self.text.splitlines()) if line.strip()), "")


class Interpreter:
    """A Python process in a folder that runs blocks one after the other, each seeing what those before it made."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-c", INTERPRETER]
        self.process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=HANG)

    def run(self, block: Block, anew: bool = False) -> str:
        """What went wrong with a block; empty when it ran."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"text": block.text, "place": block.place, "anew": anew}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('"'):
                fault: str = json.loads(line)
                return fault
        return f"the interpreter ended with {self.process.wait()}"


def blocks(page: str) -> list[Block]:
    """The blocks of a page in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(f"{page}:{text.count(chr(10), 0, match.start()) + 1}", match["kind"], match["text"], match["file"])
        for match in BLOCK.finditer(text)
    ]


def without_set_up(script: str) -> str:
    """Lines of a shell without those that install, and without the suite, which runs where its plugin is installed."""
    return re.sub(r"^quantcore check .*$", "", SET_UP.sub("", script), flags=re.MULTILINE)


def walk(page: str, folder: Path, shell: Callable[[str], str] = without_set_up) -> Iterator[str]:
    """Runs the blocks of a page in a folder that holds examples/. Gives what went wrong, with the page and the line.

    shell: what is run for the lines of a block. What a page quotes as files is written there first.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    with Interpreter(folder, environment) as interpreter:
        if page in GIVEN:
            write_files(page, folder)
            yield from named(interpreter.run(Block(page, "python", GIVEN[page], None)), page)
        for block in blocks(page):
            start, spent = time.perf_counter(), processor_seconds()
            if block.file:
                continue
            if block.kind == "python":
                fault = interpreter.run(block, anew=page in STANDING_ALONE)
            elif block.kind == "sh":
                fault = run_lines(shell(block.text), folder, environment)
            else:
                continue
            took = f"{time.perf_counter() - start:.1f} s, {processor_seconds() - spent:.1f} s of a processor in a shell"
            print(f"{block.place}: {took}, to {block.last_line[:70]!r}", flush=True)
            yield from named(fault, block.place)


def run_notebook(path: Path, folder: Path) -> Iterator[str]:
    """Runs the cells of a notebook in a folder that holds examples/, one after the other. Gives what went wrong."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    with Interpreter(folder, {**os.environ, "HF_HUB_OFFLINE": "1"}) as interpreter:
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                place = f"{path.name}, cell {number}"
                yield from named(interpreter.run(Block(place, "python", "".join(cell["source"]), None)), place)


def write_files(page: str, folder: Path) -> None:
    """Writes the files that a page quotes."""
    for block in blocks(page):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")


def run_lines(script: str, folder: Path, environment: Mapping[str, str]) -> str:
    """What went wrong with lines of a shell; empty when all ran."""
    if not script.strip():
        return ""
    # The commands of this environment, as where it is activated.
    path = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    return f"ends with {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}" if done.returncode else ""


def processor_seconds() -> float:
    """What the processes that ended have spent."""
    spent = os.times()
    return spent.children_user + spent.children_system


def named(fault: str, place: str) -> Iterator[str]:
    if fault:
        yield f"{place}: {fault}"
