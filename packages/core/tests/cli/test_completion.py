"""What a shell offers while a command line of quantcore is typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete

from quantcore.cli import VERBS, completing, main
from quantcore.cli.completion import SHELLS
from quantcore.plugins.discovery import MethodInfo


def offered(*words: str) -> list[tuple[str, str]]:
    """Value and kind of each completion of the last word."""
    *before, incomplete = words
    found = ShellComplete(main, {}, "quantcore", "_QUANTCORE_COMPLETE").get_completions(before, incomplete)
    return [(item.value, item.type) for item in found]


@pytest.fixture
def installed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [MethodInfo(method, True, ("tiny",), None, "a test"), MethodInfo("hqq", False, (), "hqq", "")]
    monkeypatch.setattr(completing, "methods", lambda: rows)


def test_verbs_are_offered_and_none_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcore.cli.group.import_string", lambda target: pytest.fail(f"{target} was imported"))
    assert [value for value, _ in offered("")] == list(VERBS)
    assert [value for value, _ in offered("comp")] == ["compare", "completion"]


@pytest.mark.parametrize("words", [("quantize",), ("eval",), ("convert",), ("compare", "a"), ("inspect",)])
def test_folders_are_offered_where_models_stand(words: tuple[str, ...]) -> None:
    assert offered(*words, "exam") == [("exam", "dir")]


@pytest.mark.parametrize("words", [("eval", "a", "--text"), ("compare", "a", "--html"), ("run",)])
def test_files_are_offered_where_files_stand(words: tuple[str, ...]) -> None:
    assert offered(*words, "ev") == [("ev", "file")]


@pytest.mark.parametrize("flag", ["--method", "-m"])
@pytest.mark.usefixtures("installed")
def test_installed_methods_are_offered(flag: str) -> None:
    assert offered("quantize", "model", flag, "") == [("tiny-int8", "plain")]
    assert offered("quantize", "model", flag, "x") == []


def test_flags_of_a_method_are_offered(method: str) -> None:
    assert ("--threshold", "plain") in offered("quantize", "model", "--method", method, "--")
    assert ("--threshold", "plain") not in offered("quantize", "model", "--")


@pytest.mark.parametrize(
    "words", [("--method", "nobody"), ("--config", "none.json"), ("--method", "none", "--config"), ("--nothing",)]
)
def test_lines_that_are_not_right_yet_are_still_completed(words: tuple[str, ...]) -> None:
    offered("quantize", "model", *words, "--dev")


def test_choices_are_offered() -> None:
    assert [value for value, _ in offered("eval", "model", "--dtype", "b")] == ["bfloat16"]


@pytest.mark.parametrize("shell", SHELLS)
def test_script_asks_the_program(shell: str, cli: Callable[..., Any]) -> None:
    result = cli("completion", shell)
    assert result.code == 0
    assert f"_QUANTCORE_COMPLETE={shell}_complete" in result.out


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_shell_understands_the_script(shell: str, cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "script").write_text(cli("completion", shell).out)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_a_line(tmp_path: Path, cli: Callable[..., Any], child_environment: dict[str, str]) -> None:
    program = tmp_path / "quantcore"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom quantcore.cli import main\nmain(prog_name='quantcore')\n")
    program.chmod(0o755)
    lines = [
        cli("completion", "bash").out,
        "COMP_WORDS=(quantcore comp)",
        "COMP_CWORD=1",
        "_quantcore_completion quantcore comp quantcore",
        'echo "${COMPREPLY[@]}"',
    ]
    environment = {**child_environment, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["compare", "completion"]
