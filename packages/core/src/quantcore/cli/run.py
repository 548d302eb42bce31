"""`quantcore run`: text from a checkpoint, to see that the model still speaks."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.completing import files
from quantcore.cli.folders import check_places
from quantcore.cli.group import Verb
from quantcore.cli.output import Output, output_options

if TYPE_CHECKING:
    from quantcore.workflows.generation import Generation

EXAMPLES = (
    'quantcore run examples/stdlib-lm "def read_lines(path):"',
    'quantcore run stdlib-lm-hqq "import os" --max-tokens 40 --temperature 0.8 --seed 1',
)


@click.command("run", cls=Verb, examples=EXAMPLES)
@click.argument("source", metavar="MODEL", shell_complete=files)
@click.argument("prompt", required=False)
@click.option("--max-tokens", metavar="N", type=click.IntRange(1), default=128, help="Of an answer [default: 128]")
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(0),
    default=0.0,
    help="0 takes the likeliest token; above it they are drawn [default: 0]",
)
@click.option("--seed", metavar="N", type=int, default=0, help="Of what is drawn [default: 0]")
@click.option("--raw", is_flag=True, help="Continue the text as it is, also where the tokenizer has a chat template.")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="Dtype to read float tensors in [default: that of the file]",
)
@click.option("--device", metavar="NAME", default="cpu", help="Where to run: cpu, cuda:0, auto [default: cpu]")
@output_options(brief="only the text")
def command(
    source: str, prompt: str | None, raw: bool, dtype: str | None, device: str, output: Output, **settings: Any
) -> None:
    """Continue PROMPT with MODEL, a folder, a hub id or a container such as a .gguf file.

    Without PROMPT lines of stdin are answered one by one; on a terminal that is a conversation, where the tokenizer
    has a chat template. How fast it went stands on stderr.
    """
    if prompt == "":
        raise click.UsageError("argument PROMPT is empty: there is nothing to continue; write some text")
    check_places([source], device=device)
    from quantcore.checkpoints.read import resolve
    from quantcore.integrations.transformers import load_tokenizer
    from quantcore.workflows.generation import generate, prompt_ids
    from quantcore.workflows.model import load

    path = resolve(source)
    tokenizer = load_tokenizer(path)
    as_chat = not raw and getattr(tokenizer, "chat_template", None) is not None
    model = load(path, device_map=device, dtype=dtype, prepare=True)
    messages: list[tuple[str, str]] = []
    for text in [prompt] if prompt is not None else _lines():
        messages.append(("user", text))
        ids = prompt_ids(tokenizer, messages, as_chat=as_chat)
        found = generate(model, tokenizer, ids, show=_show(output), **settings)
        messages.append(("assistant", found.text))
        _report(found, output)


def _lines() -> Any:
    """What is typed or piped, until an empty line or the end."""
    if sys.stdin.isatty():
        click.echo("an empty line ends it", err=True)
    for line in sys.stdin:
        if not line.strip():
            return
        yield line.rstrip("\n")


def _show(output: Output) -> Any:
    """Text goes to stdout as it comes; JSON needs all of it first."""
    return (lambda text: None) if output.as_json else (lambda text: click.echo(text, nl=False))


def _report(found: Generation, output: Output) -> None:
    if output.as_json:
        data = {**dataclasses.asdict(found), "tokens_per_second": found.tokens_per_second}
        output.result(data, str, "")
        return
    click.echo()
    output.note(
        f"{found.prompt_tokens} tokens read in {found.first_seconds:.2f} s, {found.tokens} written, "
        f"{found.tokens_per_second:.1f} tokens/s"
    )
