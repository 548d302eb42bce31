"""`quantcore check`: the conformance suite."""

from __future__ import annotations

import click

from quantcore.cli.completing import installed
from quantcore.cli.group import Verb
from quantcore.cli.methods import chosen_backend


@click.command("check", cls=Verb, examples=("quantcore check hqq", "quantcore check bitsandbytes --verbose"))
@click.argument("methods", metavar="METHOD...", shell_complete=installed, nargs=-1, required=True)
@click.option("--verbose", is_flag=True, help="Name every test.")
def command(methods: tuple[str, ...], verbose: bool) -> None:
    """Run the conformance suite on each installed METHOD: what every method must do. Needs pytest."""
    # An absent or broken backend is told before any test starts.
    names = [chosen_backend(method, "METHOD").method for method in methods]
    from quantcore.testing import run

    if run(*names, verbose=verbose) != 0:
        raise click.exceptions.Exit(1)
