"""The command line. A verb's module is imported when the verb is chosen, so that help stays fast."""

from __future__ import annotations

from typing import Any

import click

from quantcore.cli.group import Program, VerbEntry
from quantcore.cli.logs import send_logs_to_stderr

VERBS = {
    "list": VerbEntry("quantcore.cli.list_methods:command", "Show the methods: installed and known."),
    "doctor": VerbEntry("quantcore.cli.doctor:command", "Show what is here, what works, and why not the rest."),
    "quantize": VerbEntry("quantcore.cli.quantize:command", "Quantize a checkpoint folder."),
    "convert": VerbEntry("quantcore.cli.convert:command", "Write a quantized folder in another format."),
    "inspect": VerbEntry("quantcore.cli.inspect:command", "Show what a checkpoint folder stores."),
    "run": VerbEntry("quantcore.cli.run:command", "Continue a text with a model."),
    "serve": VerbEntry("quantcore.cli.serve:command", "Answer OpenAI's API with a model."),
    "eval": VerbEntry("quantcore.cli.eval:command", "Measure a checkpoint on a text."),
    "compare": VerbEntry("quantcore.cli.compare:command", "Compare checkpoints, or configs, on a text."),
    "bench": VerbEntry("quantcore.cli.bench:command", "Time the kernels of a method."),
    "recommend": VerbEntry("quantcore.cli.recommend:command", "List configs that bring a model into a given memory."),
    "check": VerbEntry("quantcore.cli.check:command", "Run the conformance suite on a method."),
    "completion": VerbEntry("quantcore.cli.completion:command", "Print what makes a shell complete quantcore."),
    "new-backend": VerbEntry("quantcore.cli.new_backend:command", "Write the package of a new method to start from."),
}

EXAMPLES = (
    "quantcore list",
    "quantcore quantize examples/stdlib-lm stdlib-lm-hqq --method hqq --nbits 4",
    "quantcore eval stdlib-lm-hqq --text examples/stdlib-lm/eval.txt --max-tokens 4096",
)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    import quantcore

    click.echo(f"quantcore {quantcore.__version__}")
    ctx.exit()


@click.group(
    "quantcore",
    cls=Program,
    verbs=VERBS,
    examples=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def main(**kwargs: Any) -> None:
    """Quantize PyTorch models, look at the result, and measure it.

    QUANTCORE_DEBUG=1 shows the traceback of an error.
    """
    send_logs_to_stderr()
