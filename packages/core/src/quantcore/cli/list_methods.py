"""`quantcore list`: the methods that are installed, and those that could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from quantcore.cli.group import Verb
from quantcore.cli.output import Output, output_options, table
from quantcore.distribution import install_line
from quantcore.plugins.discovery import MethodInfo, methods


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
        "install": install_line(info.extra) if info.extra is not None and info.is_available else None,
        "summary": info.summary,
    }


def _text(data: list[dict[str, Any]]) -> str:
    installed = [(row["method"], _owner(row["distributions"]), row["summary"]) for row in data if row["installed"]]
    here = {row["install"]: row["distributions"][0] for row in data if row["installed"] and row["install"]}
    known = [(row["method"], _to_install(row["install"], here), row["summary"]) for row in data if not row["installed"]]
    parts = [table(("installed", "provided by", "what it is"), installed)] if installed else ["no method is installed"]
    parts += [table(("known", "to install it", "what it is"), known)] if known else []
    return "\n\n".join(parts)


def _to_install(line: str | None, here: Mapping[str, str]) -> str:
    """The line that installs a method, or why it would not help."""
    if line is None:
        return "not available yet"
    return f"not in {here[line]}" if line in here else line


def _owner(distributions: list[str]) -> str:
    return distributions[0] if len(distributions) == 1 else f"claimed twice: {' and '.join(sorted(distributions))}"
