"""Calibration by two processes that torchrun started (gloo): the bytes of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import together
import torch
from click.testing import CliRunner

from quantcore.cli import main

SCRIPT = Path(together.__file__)
LIMIT = 900  # seconds, on a machine with much else to do


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as torchrun gives a process, for the last bit of sums depends on that."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Two processes on a port that the system chooses."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, text=True, capture_output=True, timeout=LIMIT, check=False
    )


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder; of config.json what is said of the quantization."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**files, "config.json": json.loads(files["config.json"])["quantization_config"]}


class Stop(Exception):
    """Ends a run after its first block."""


def stop_after_a_block(state: Any) -> None:
    if state.block == 2:
        raise Stop


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    together.save_float(tmp_path / "float")
    for method in together.CONFIGS:
        together.to_file(method, tmp_path / "float", tmp_path / f"one-{method}")
    for method in ("gptq", "awq", "auto-round"):
        with pytest.raises(Stop):
            together.to_file(method, tmp_path / "float", tmp_path / f"stopped-{method}", progress=stop_after_a_block)
    done = torchrun(SCRIPT, "finish_all", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for method in together.CONFIGS:
        expected = contents(tmp_path / f"one-{method}")
        assert contents(tmp_path / f"files-{method}") == expected, method
        for way in ("memory", "stopped", "bounded"):
            if (tmp_path / f"{way}-{method}").exists():
                assert contents(tmp_path / f"{way}-{method}") == expected, (way, method)


def test_one_process_goes_on_where_two_died(tmp_path: Path) -> None:
    together.save_float(tmp_path / "float")
    together.to_file("gptq", tmp_path / "float", tmp_path / "one")
    done = torchrun(SCRIPT, "die", tmp_path)
    assert done.returncode != 0
    assert not (tmp_path / "died").exists()
    assert "another of 2 processes ended without a word" in (tmp_path / "told-0").read_text()
    together.to_file("gptq", tmp_path / "float", tmp_path / "died")
    assert contents(tmp_path / "died") == contents(tmp_path / "one")


def test_what_one_process_raises_ends_the_other(tmp_path: Path) -> None:
    torchrun(SCRIPT, "fail", tmp_path)
    assert (tmp_path / "told-1").read_text() == "ValueError: no room for the solution"
    assert (tmp_path / "told-0").read_text() == "ProcessGroupError: process 1 of 2 ended: no room for the solution"


def test_the_command_speaks_once(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples" / "stdlib-lm"
    data = ["--calibration", example / "calibration.txt", "--samples", 2, "--batch-size", 1, "--seqlen", 16]
    method = ["--method", "gptq", "--bits", 4, "--group-size", 32]
    command = ["-m", "quantcore.cli", "quantize", example, tmp_path / "made", *method, *data]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("calibrated on 2 rows") == done.stdout.count("load it with") == 1
    assert done.stderr.count("quantizing 42 layers") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_errors_are_those_of_the_first_process(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "here", "WORLD_SIZE": "2", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    for arguments, status in ((["inspect", str(tmp_path)], 1), (["inspect", "--no-such-flag"], 2)):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == status
        shown = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert len(shown) == (1 if rank == 0 else 0)
        assert bool(done.output) == (rank == 0)
