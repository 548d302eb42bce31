"""`quantcore list`: the methods that are installed, and those that could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from quantcore.cli.group import Verb
from quantcore.cli.output import Output, output_options, table
from quantcore.errors import QuantcoreError
from quantcore.plugins.discovery import MethodInfo, methods
from quantcore.plugins.known import install_line


@click.command("list", cls=Verb, examples=("quantcore list", "quantcore list --json", "quantcore list --quiet"))
@output_options(brief="only the names of the installed methods")
def command(output: Output) -> None:
    """Show the methods: which are installed and by which package, and how to install the others."""
    infos = methods()
    data = [_describe(info) for info in infos]
    brief = "\n".join(info.method for info in infos if info.installed)
    output.result(data, lambda: _text(data), brief)


def _describe(info: MethodInfo) -> dict[str, Any]:
    return {
        "method": info.method,
        "installed": info.installed,
        "distributions": list(info.distributions),
        "install": None if info.extra is None else install_line(info.method),
        "summary": info.summary or _own_summary(info),
    }


def _own_summary(info: MethodInfo) -> str:
    """What the backend of a method that only it knows says of itself."""
    from quantcore.plugins.manager import plugins

    try:
        return plugins().backend(info.method).summary
    except QuantcoreError:
        return "does not load; see quantcore doctor"


def _text(data: list[dict[str, Any]]) -> str:
    installed = [(row["method"], _owner(row["distributions"]), row["summary"]) for row in data if row["installed"]]
    here = {row["install"]: row["distributions"][0] for row in data if row["installed"]}
    known = [(row["method"], _to_install(row["install"], here), row["summary"]) for row in data if not row["installed"]]
    parts = [table(("installed", "provided by", "what it is"), installed)] if installed else ["no method is installed"]
    parts += [table(("known", "to install it", "what it is"), known)] if known else []
    return "\n\n".join(parts)


def _to_install(line: str, here: Mapping[str, str]) -> str:
    """The line that installs a method; where what it installs is here already, that it lacks the method."""
    return f"not in {here[line]} yet" if line in here else line


def _owner(distributions: list[str]) -> str:
    return distributions[0] if len(distributions) == 1 else f"claimed twice: {' and '.join(sorted(distributions))}"
