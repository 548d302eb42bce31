"""How results, progress and errors are shown: results on stdout, as text or JSON; everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from quantcore import settings
from quantcore.cli.logs import silence_logs

Function = TypeVar("Function", bound=Callable[..., Any])

_ERROR_LINES = 8
_JSON_WIDTH = 100
_LONGEST_LINE = 300  # characters of an error that nobody foresaw


@dataclass(frozen=True)
class Output:
    """The form of output that the user chose; text unless one of the two is set."""

    as_json: bool = False
    quiet: bool = False

    def result(self, data: Any, text: Callable[[], str], brief: str) -> None:
        """Print a result on stdout: data as JSON, text() for people, or brief under --quiet."""
        if not settings.is_first_process():
            return
        if self.as_json:
            click.echo(pages(_jsonable(data)))
        elif not self.quiet:
            click.echo(text())
        elif brief:
            click.echo(brief)

    def note(self, text: str) -> None:
        """Print a line of progress on stderr, unless --quiet."""
        if self.shows_progress:
            click.echo(text, err=True)

    @property
    def shows_progress(self) -> bool:
        """Whether progress is wanted: as a bar on a terminal, as lines elsewhere."""
        return not self.quiet and settings.is_first_process()


def output_options(brief: str) -> Callable[[Function], Function]:
    """Decorator: adds --json and --quiet to a verb, which receives them as `output`. brief: what --quiet prints."""

    def decorate(function: Function) -> Function:
        quiet = ("--quiet", "-q"), f"Print {brief}; no progress, no warnings."
        for flags, text in (quiet, (("--json",), "Print JSON.")):
            function = click.option(*flags, is_flag=True, expose_value=False, callback=_collect, help=text)(function)
        return function

    return decorate


def pages(value: Any, depth: int = 0) -> str:
    """JSON for people too: what fits stands on one line, the rest is broken and indented."""
    line, indent = json.dumps(value), "  " * (depth + 1)
    if not value or not isinstance(value, dict | list) or len(line) + 2 * depth <= _JSON_WIDTH:
        return line
    if isinstance(value, dict):
        parts, ends = [f"{json.dumps(key)}: {pages(item, depth + 1)}" for key, item in value.items()], "{}"
    else:
        parts, ends = [pages(item, depth + 1) for item in value], "[]"
    return f"{ends[0]}\n" + ",\n".join(indent + part for part in parts) + f"\n{indent[2:]}{ends[1]}"


def _collect(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    chosen: Output = ctx.params.get("output", Output())
    if param.name == "quiet":
        if value:
            silence_logs()
        ctx.params["output"] = dataclasses.replace(chosen, quiet=value)
    else:
        ctx.params["output"] = dataclasses.replace(chosen, as_json=value)


def shows_error() -> bool:
    """Whether this process shows an error; of several that work together and end together, one does."""
    # Not imported here: an interrupt may have left torch half imported, and then there is no group yet.
    processes = sys.modules.get("quantcore.distributed.processes")
    return settings.is_first_process() if processes is None else bool(processes.shows_error())


def show_error(error: BaseException) -> None:
    """Print a known error on stderr without its traceback; a long list of faults is cut."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:  # the system's own, not one with a text of ours
        text = f"{error.filename}: {error.strerror}"
    lines = text.rstrip().splitlines()
    if len(lines) > _ERROR_LINES:
        lines[_ERROR_LINES:] = [f"... and {len(lines) - _ERROR_LINES} more; QUANTCORE_DEBUG=1 shows all"]
    click.echo(styled("Error: ", fg="red", bold=True) + "\n".join(lines), err=True)


def show_unforeseen(error: BaseException) -> None:
    """Print an error that nobody foresaw on stderr: what it says, where it was raised, and how to see more."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}quantcore" in frame.filename] or frames
    where = f" (at {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    text = " ".join(str(error).split())[:_LONGEST_LINE]
    click.echo(styled("Error: ", fg="red", bold=True) + f"{type(error).__name__}: {text}{where}", err=True)
    click.echo("a damaged file, or a fault of quantcore; QUANTCORE_DEBUG=1 shows the traceback", err=True)


def styled(text: str, **style: Any) -> str:
    """Text with terminal colours, unless NO_COLOR is set. `click.echo` drops them where the stream is no terminal."""
    return text if settings.no_color() else click.style(text, **style)


def heading(text: str) -> str:
    return styled(text, bold=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()) -> str:
    """Aligned columns under a heading, two blanks apart. right: columns that are set flush right."""
    lines = aligned([columns, *rows], [name in right for name in columns])
    return "\n".join([heading(lines[0]), *lines[1:]])


def aligned(rows: Sequence[Sequence[object]], right: Sequence[bool] = ()) -> list[str]:
    """A line for each row, its cells in columns two blanks apart; right: whether a column is set flush right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    flush = right or [False] * len(widths)
    return [
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in cells
    ]


def in_bytes(count: int) -> str:
    """A size in the unit that keeps it short: "987 B", "4.10 MB", "14.2 GB"; powers of 1000, as in --max-shard-size."""
    if count < 1000:
        return f"{count} B"
    size, units = float(count), ["kB", "MB", "GB", "TB"]
    while size >= 999.5 and units:
        size, unit = size / 1000, units.pop(0)
    return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f} {unit}"


def plural(count: int, noun: str) -> str:
    """ "1 layer", "42 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _jsonable(value: Any) -> Any:
    """JSON types only; numbers that JSON does not have become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
