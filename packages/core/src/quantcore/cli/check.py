"""`quantcore check`: the conformance suite."""

from __future__ import annotations

import click

from quantcore.cli.group import Verb
from quantcore.cli.methods import chosen_backend


@click.command("check", cls=Verb, examples=("quantcore check hqq", "quantcore check bitsandbytes --verbose"))
@click.argument("method")
@click.option("--verbose", is_flag=True, help="Name every test.")
def command(method: str, verbose: bool) -> None:
    """Run the conformance suite on an installed METHOD: what every method must do. Needs pytest."""
    backend = chosen_backend(method, "METHOD")  # an absent or broken backend is told before any test starts
    from quantcore.testing import run

    if run(backend.method, verbose=verbose) != 0:
        raise click.exceptions.Exit(1)
