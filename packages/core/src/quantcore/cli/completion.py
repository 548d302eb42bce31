"""`quantcore completion`: the script with which a shell completes verbs, flags, methods and folders."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from quantcore.cli.group import Verb

SHELLS = ("bash", "zsh", "fish")
EXAMPLES = tuple(f"quantcore completion {shell}" for shell in SHELLS)
_PROGRAM = "quantcore"


@click.command("completion", cls=Verb, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script that makes a shell complete quantcore.

    \b
    bash  into ~/.local/share/bash-completion/completions/quantcore
    zsh   into _quantcore in a folder of $fpath, such as ~/.zfunc
    fish  into ~/.config/fish/completions/quantcore.fish

    For one session: eval "$(quantcore completion bash)".
    """
    from quantcore.cli import main

    found = get_completion_class(shell)
    assert found is not None  # click has each of SHELLS
    click.echo(found(main, {}, _PROGRAM, f"_{_PROGRAM.upper()}_COMPLETE").source())
