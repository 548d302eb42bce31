"""Commands as quantcore has them: lazy verbs, examples in every help, nearest matches, and errors of one line."""

from __future__ import annotations

import difflib
import dis
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from quantcore import settings
from quantcore.cli.interrupts import exit_status, sigterm_as_interrupt
from quantcore.cli.output import show_error, show_unforeseen, shows_error
from quantcore.errors import QuantcoreError
from quantcore.plugins.backend import import_string

_RAISE = dis.opmap["RAISE_VARARGS"]


class VerbEntry(NamedTuple):
    target: str  # "module:attribute" of its click command
    help: str


class Verb(click.Command):
    """A command whose help ends with examples; a mistyped flag gets the nearest match and the list."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **{"options_metavar": "[FLAGS]", **kwargs})
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"no flag {error.option_name}{self.flags_beside(ctx, error.option_name)}", ctx
            ) from error

    def flags_beside(self, ctx: click.Context, flag: str) -> str:
        """What to say of the flags that there are to somebody who gave another."""
        flags = long_flags(self.get_params(ctx))
        return f"{nearest(flag, flags)}\nFlags: {', '.join(flags)}"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_flags("Flags", self.get_params(ctx), ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples, formatter)


class LazyGroup(click.Group):
    """A group whose verbs are rows of a table until one is chosen."""

    def __init__(self, *args: Any, verbs: Mapping[str, VerbEntry], examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **{"options_metavar": "", "subcommand_metavar": "VERB ...", **kwargs})
        self.verbs = verbs
        self.examples = examples

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        verb: click.Command = import_string(self.verbs[cmd_name].target)
        return verb

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The verbs that begin so, of which none is imported, and the group's own flags."""
        verbs = [(name, entry.help) for name, entry in self.verbs.items() if name.startswith(incomplete)]
        return [CompletionItem(name, help=text) for name, text in verbs] + click.Command.shell_complete(
            self, ctx, incomplete
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not args[0].startswith("-") and args[0] not in self.verbs:
            text = f"no verb {args[0]!r}{nearest(args[0], self.verbs)}\nVerbs: {', '.join(self.verbs)}"
            raise click.UsageError(text, ctx)
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_flags("Flags", self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, entry.help) for name, entry in self.verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(self.examples, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb. A known error becomes its text and exit status 1, or its traceback under QUANTCORE_DEBUG."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe went away; click ends quietly
            raise
        except (QuantcoreError, OSError, ValueError, TypeError) as error:
            if settings.debug() or not _is_deliberate(error):
                raise
            if shows_error():
                show_error(error)
            raise click.exceptions.Exit(1) from error


class Program(LazyGroup):
    """The outermost group: what nobody foresaw is told in two lines too, with where it happened."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with sigterm_as_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if shows_error():
                click.echo("interrupted", err=True)
            raise click.exceptions.Exit(exit_status(interrupt)) from interrupt
        except click.ClickException as error:
            if shows_error():
                raise
            raise click.exceptions.Exit(error.exit_code) from error
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # the outermost place: a plugin or a damaged file may cause anything
            if settings.debug():
                raise
            if shows_error():
                show_unforeseen(error)
            raise click.exceptions.Exit(1) from error


def _is_deliberate(error: BaseException) -> bool:
    """Whether an error was made for the user: any of ours or of the system, else one that a `raise` statement made.

    A TypeError of a wrong call is no such error, but a fault of the program: it keeps its traceback.
    """
    if isinstance(error, QuantcoreError | OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_code[trace.tb_lasti] == _RAISE


def nearest(word: str, candidates: Iterable[str]) -> str:
    """ "; did you mean X?" with the candidate that is most like word, or nothing when none is."""
    found = difflib.get_close_matches(word, list(candidates), 1)
    return f"; did you mean {found[0]}?" if found else ""


def write_flags(
    title: str, parameters: Iterable[click.Parameter], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write a help section of the options among the parameters."""
    options = [parameter for parameter in parameters if isinstance(parameter, click.Option)]
    records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
    with formatter.section(title):
        formatter.write_dl(records)


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Write a section of command lines, one a line, as they are."""
    if not examples:
        return
    with formatter.section("Examples"):
        for example in examples:
            formatter.write(f"{' ' * formatter.current_indent}{example}\n")


def long_flags(parameters: Iterable[click.Parameter]) -> list[str]:
    """The flags of two dashes among the parameters, in order of the alphabet."""
    flags = (flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts))
    return sorted(flag for flag in flags if flag.startswith("--"))
