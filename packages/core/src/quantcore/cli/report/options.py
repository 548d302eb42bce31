"""The flags of verbs that write reports, checked before any work is done."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from quantcore._optional import require
from quantcore.cli.completing import files
from quantcore.cli.group import nearest

Function = Callable[..., Any]
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Wanted:
    """The files to write: a page, or a single picture by its key. layer: whose weights and codes they show."""

    html: Path | None = None
    png: Path | None = None
    picture: str | None = None
    layer: str | None = None

    @property
    def any(self) -> bool:
        return self.html is not None or self.png is not None


def report_options(pictures: str, layer: str, needing: Mapping[str, str] = _NONE) -> Callable[[Function], Function]:
    """Decorator: adds the flags of a report to a verb, which receives them as `report`, checked.

    pictures: their keys, in words. layer: the default. needing: flags of the verb that say nothing without a report, by
    the names under which it receives them.
    """
    options = (
        click.option(
            "--html", metavar="FILE", shell_complete=files, help="Write a report as one page that needs nothing else."
        ),
        click.option("--png", metavar="FILE", shell_complete=files, help="Write a single picture."),
        click.option("--picture", metavar="NAME", help=f"Which one: {pictures}"),
        click.option("--layer", metavar="NAME", help=f"Whose weights and codes to show [default: {layer}]"),
        click.option("--force", "-f", is_flag=True, help="Replace these files if they are there."),
    )

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_report(
            html: str | None, png: str | None, picture: str | None, layer: str | None, force: bool, **others: Any
        ) -> Any:
            values = {flag: others[name] for name, flag in needing.items()}
            found = Wanted(_path(html), _path(png), picture, layer)
            _check(found, force, {"--force": force, "--layer": layer, **values})
            return function(report=found, **others)

        for option in reversed(options):
            with_report = option(with_report)
        return with_report

    return decorate


def _check(found: Wanted, force: bool, needing: Mapping[str, object]) -> None:
    """Check what the flags ask for. needing: flags that say nothing without a report.

    Raises click.UsageError for such flags alone, MissingExtraError without matplotlib, and OSError for a file that is
    there or cannot be written.
    """
    alone = [flag for flag, value in needing.items() if value]
    if alone and not found.any:
        raise click.UsageError(f"{', '.join(alone)} needs --html or --png")
    if found.picture is not None and found.png is None:
        raise click.UsageError("--picture needs --png")
    if found.any:
        require("matplotlib", "report")
    for path in (found.html, found.png):
        if path is not None:
            _check_file(path, force)


def chosen_picture(wanted_key: str | None, keys: list[str]) -> str:
    """The key of the picture to write: the first, unless --picture names another."""
    key = keys[0] if wanted_key is None else wanted_key
    if key not in keys:
        raise click.BadParameter(
            f"no picture {key!r}{nearest(key, keys)}; there are {', '.join(keys)}", param_hint="--picture"
        )
    return key


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _check_file(path: Path, force: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists; choose another file, or replace it with --force")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} cannot be written, for its folder is none or is read-only; choose another")
