"""Errors and results as the command line shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest

from quantcore.cli import main
from quantcore.cli.group import LazyGroup, VerbEntry
from quantcore.cli.output import in_bytes, plural, table
from quantcore.errors import CheckpointError, MissingExtraError


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str]) -> Callable[[Exception | Callable[[], object]], tuple[int, str, str]]:
    """Runs a verb that raises an error, or calls what does."""

    def run(error: Exception | Callable[[], object]) -> tuple[int, str, str]:
        @click.command()
        def verb() -> None:
            if isinstance(error, Exception):
                raise error
            error()

        class Group(LazyGroup):
            def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
                return verb

        with pytest.raises(SystemExit) as ended:
            Group("group", verbs={"verb": VerbEntry("", "")}).main(["verb"])
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.mark.parametrize("error_class", [ValueError, TypeError, CheckpointError, MissingExtraError, FileNotFoundError])
def test_a_known_error_is_its_text(failing: Callable[..., tuple[int, str, str]], error_class: type[Exception]) -> None:
    assert failing(error_class("what was found; what to do")) == (1, "", "Error: what was found; what to do\n")


def test_an_error_of_the_system_names_the_file(failing: Callable[..., tuple[int, str, str]]) -> None:
    assert failing(Path("/no/such/file").read_text)[2] == "Error: /no/such/file: No such file or directory\n"


def test_a_long_list_of_faults_is_cut(failing: Callable[..., tuple[int, str, str]]) -> None:
    lines = failing(ValueError("\n".join(map(str, range(30)))))[2].splitlines()
    assert lines[-1] == "... and 22 more; QUANTCORE_DEBUG=1 shows all"
    assert len(lines) == 9


def test_a_fault_of_the_program_keeps_its_traceback(failing: Callable[..., tuple[int, str, str]]) -> None:
    with pytest.raises(TypeError):
        failing(lambda: len(3))  # type: ignore[arg-type]


def test_what_nobody_foresaw_is_two_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: object) -> None:
        raise KeyError("a key")

    monkeypatch.setattr("quantcore.cli.list_methods.methods", fail)
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    assert ended.value.code == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("Error: KeyError: 'a key' (at ")
    assert "QUANTCORE_DEBUG=1 shows the traceback" in second
    monkeypatch.setenv("QUANTCORE_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["list"])


def test_debug_keeps_the_traceback_of_a_known_error(
    failing: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTCORE_DEBUG", "1")
    with pytest.raises(ValueError, match="known"):
        failing(ValueError("known"))


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (2_100_000, "2.10 MB"),
        (99_960_000, "100 MB"),
        (999_999_999, "1.00 GB"),
        (14_200_000_000, "14.2 GB"),
        (10**16, "10000 TB"),
    ],
)
def test_sizes_are_short(count: int, expected: str) -> None:
    assert in_bytes(count) == expected


def test_columns_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert table(("name", "size"), [("a", 10), ("longer", 5)], right=("size",)) == (
        "name    size\na         10\nlonger     5"
    )


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in table(("name",), [])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in table(("name",), [])


def test_plural_counts() -> None:
    assert (plural(1, "layer"), plural(1042, "layer")) == ("1 layer", "1,042 layers")
