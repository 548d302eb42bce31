"""How results, progress and errors are shown: results on stdout, as text or JSON; everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from quantcore import settings
from quantcore.cli.logs import silence_logs

Function = TypeVar("Function", bound=Callable[..., Any])

_ERROR_LINES = 8


@dataclass(frozen=True)
class Output:
    """The form of output that the user chose; text unless one of the two is set."""

    as_json: bool = False
    quiet: bool = False

    def result(self, data: Any, text: Callable[[], str], brief: str) -> None:
        """Print a result on stdout: data as JSON, text() for people, or brief under --quiet."""
        if self.as_json:
            click.echo(json.dumps(_jsonable(data), indent=2))
        elif not self.quiet:
            click.echo(text())
        elif brief:
            click.echo(brief)

    def note(self, text: str) -> None:
        """Print a line of progress on stderr, unless --quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    @property
    def shows_progress(self) -> bool:
        """Whether a progress bar is wanted and stderr is a terminal."""
        return not self.quiet and sys.stderr.isatty()


def output_options(brief: str) -> Callable[[Function], Function]:
    """Decorator: adds --json and --quiet to a verb, which receives them as `output`. brief: what --quiet prints."""

    def decorate(function: Function) -> Function:
        for flag, text in (("--quiet", f"Print {brief}; no progress, no warnings."), ("--json", "Print JSON.")):
            function = click.option(flag, is_flag=True, expose_value=False, callback=_collect, help=text)(function)
        return function

    return decorate


def _collect(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    chosen: Output = ctx.params.get("output", Output())
    if param.name == "quiet":
        if value:
            silence_logs()
        ctx.params["output"] = dataclasses.replace(chosen, quiet=value)
    else:
        ctx.params["output"] = dataclasses.replace(chosen, as_json=value)


def show_error(error: BaseException) -> None:
    """Print a known error on stderr without its traceback; a long list of faults is cut."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:  # the system's own, not one with a text of ours
        text = f"{error.filename}: {error.strerror}"
    lines = text.rstrip().splitlines()
    if len(lines) > _ERROR_LINES:
        lines[_ERROR_LINES:] = [f"... and {len(lines) - _ERROR_LINES} more; QUANTCORE_DEBUG=1 shows all"]
    click.echo(styled("Error: ", fg="red", bold=True) + "\n".join(lines), err=True)


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
