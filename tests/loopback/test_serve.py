"""`quantcore serve`: the bundled model, quantized, answers OpenAI's API on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import pages  # noqa: E402  # found there alone
from command import cli  # noqa: E402

MODEL = ROOT / "examples" / "stdlib-lm"
CONFIG = ("--method", "hqq", "--nbits", "4", "--group-size", "64")
PROMPT, TOKENS = "def read_lines(path):", 8
HANG = 600  # seconds that only a hang reaches


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hqq"
    assert cli("quantize", MODEL, folder, *CONFIG).code == 0
    return folder


@pytest.fixture
def port() -> int:
    with socket.create_server(("localhost", 0)) as found:
        number: int = found.getsockname()[1]
    return number


@pytest.fixture
def server(quantized: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "quantcore.cli", "serve", str(quantized), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, port)
        yield process
        process.kill()


def wait_for(process: subprocess.Popen[str], port: int) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nobody listens at {port} after {HANG} s")


def ask(port: int, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=HANG) as answer:
        return json.load(answer)


def test_it_continues_a_text_as_run_does(server: subprocess.Popen[str], port: int, quantized: Path) -> None:
    expected = cli("run", quantized, PROMPT, "--max-tokens", TOKENS, "--json").json
    answer = ask(port, "completions", model=str(quantized), prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert answer["choices"][0]["text"] == expected["text"]
    assert answer["usage"]["completion_tokens"] == TOKENS


def test_an_address_that_is_taken_is_told_before_the_model_is_read(port: int, quantized: Path) -> None:
    with socket.create_server(("localhost", port)):
        result = cli("serve", quantized, "--port", port)
    assert result.code == 1
    assert f"cannot listen at localhost:{port}" in result.err
    assert "--port" in result.err


def test_interrupt_ends_it_with_the_status_of_one(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGINT)
    err = server.communicate(timeout=HANG)[1]
    assert server.returncode == 128 + signal.SIGINT
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "notes.txt"])
def test_a_folder_that_quantcore_does_not_read_is_refused(name: str, tmp_path: Path, port: int) -> None:
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    (tmp_path / name).write_bytes(b"")
    result = cli("serve", tmp_path, "--port", port)
    assert result.code == 1
    assert str(tmp_path) in result.err
    assert "Traceback" not in result.err


def test_the_lines_of_the_page_answer(tmp_path: Path) -> None:
    (block,) = (found for found in pages.blocks("docs/how-to.md") if found.kind == "bash")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    assert pages.run_lines(pages.without_set_up(block.text), tmp_path, environment) == ""
    assert json.loads((tmp_path / "made" / "answer.json").read_text())["choices"][0]["text"]
