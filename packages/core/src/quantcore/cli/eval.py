"""`quantcore eval`: how good, how fast and how large a checkpoint is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.completing import files, folders
from quantcore.cli.folders import check_places, text_of, told_in_flags
from quantcore.cli.group import Verb
from quantcore.cli.model_card import note_quality
from quantcore.cli.output import Function, Output, in_bytes, output_options, table

if TYPE_CHECKING:
    from quantcore.workflows.evaluation import Evaluation

EXAMPLES = (
    "quantcore eval examples/stdlib-lm --text examples/stdlib-lm/eval.txt --max-tokens 4096",
    "quantcore eval stdlib-lm-hqq --text examples/stdlib-lm/eval.txt --reference examples/stdlib-lm",
)

READING_FLAGS = {"window": "--window", "max_tokens": "--max-tokens"}  # by argument of the evaluation
_TOKEN = 16  # characters that no tokenizer's tokens reach on the average
_READING = (
    click.option(
        "--max-tokens",
        metavar="N",
        type=click.IntRange(2),
        default=40_960,
        help="Tokens of the text to read [default: 40960]",
    ),
    click.option(
        "--window",
        metavar="N",
        type=click.IntRange(2),
        default=256,
        help="Tokens predicted on their own, as one piece [default: 256]",
    ),
    click.option("--batch", metavar="N", type=click.IntRange(1), default=8, help="Windows a forward pass [default: 8]"),
    click.option(
        "--dtype",
        type=click.Choice(("float32", "bfloat16", "float16")),
        help="Dtype to read float tensors in [default: that of the file]",
    ),
    click.option(
        "--device", "-d", metavar="NAME", default="cpu", help="Where to run: cpu, cuda:0, auto [default: cpu]"
    ),
)


def reading_options(function: Function) -> Function:
    """Decorator: the flags that say how much of the text is read, and how the model runs."""
    for option in reversed(_READING):
        function = option(function)
    return function


text_option = click.option(
    "--text",
    "-t",
    metavar="FILE",
    shell_complete=files,
    required=True,
    help="UTF-8 text to predict, or wikitext2, c4, pileval.",
)


@click.command("eval", cls=Verb, examples=EXAMPLES)
@click.argument("directory", metavar="DIR", shell_complete=folders)
@text_option
@click.option(
    "--reference", metavar="DIR", shell_complete=folders, help="The model before quantizing, to compare with."
)
@click.option("--card", is_flag=True, help="Write the result into the model card of DIR, too.")
@reading_options
@output_options(brief="only the perplexity")
def command(directory: str, text: str, card: bool, output: Output, **options: Any) -> None:
    """Measure the checkpoint folder DIR on a text: perplexity, tokens per second, size on disk.

    With --reference also the perplexity and size of that model, the KL divergence from it, and how often both put the
    same token first.
    """
    reference = options["reference"]
    check_places([directory, *([] if reference is None else [reference])], device=options["device"])
    content = read_text(text, options["max_tokens"])
    from quantcore.cli.progress import progress_bar
    from quantcore.workflows.evaluation import evaluate

    with progress_bar(output) as update, told_in_flags(READING_FLAGS):
        result = evaluate(
            directory,
            content,
            report=output.note,
            progress=lambda done, total: update(done, total, f"{done} of {total} tokens"),
            **options,
        )
    if card:
        note_quality(Path(directory), _in_one_line(result, Path(text).name))
    output.result(dataclasses.asdict(result), lambda: _text(result), f"{result.perplexity:.4f}")


def _in_one_line(result: Evaluation, text: str) -> str:
    """A measurement for a model card."""
    parts = [f"perplexity {result.perplexity:.3f}"]
    if result.reference_perplexity is not None:
        parts.append(f"of the source {result.reference_perplexity:.3f}")
        parts.append(f"KL divergence from it {result.kl_divergence:.5f} nats a token")
    return f"{', '.join(parts)}; over {result.tokens:,} tokens of {text}"


def read_text(name: str, tokens: int) -> str:
    """The text of a file, or of a customary data set as much as has so many tokens.

    Raises ValueError for a file that is no UTF-8, FileNotFoundError for what is neither, and what `named_texts` does.
    """
    from quantcore.calibration.datasets import DATASETS

    if name in DATASETS:
        return _beginning_of(name, tokens)
    return text_of(name, "--text")


def _beginning_of(name: str, tokens: int) -> str:
    """The held-out texts of a data set, a blank line between two, up to a length that holds so many tokens."""
    from quantcore.calibration.datasets import HELD_OUT, named_texts

    taken: list[str] = []
    length = 0
    for text in named_texts(name, HELD_OUT):
        taken.append(text)
        length += len(text)
        if length >= _TOKEN * tokens:
            break
    return "\n\n".join(taken)


def _text(result: Evaluation) -> str:
    rows = [("model", *_cells(result.perplexity, result.tokens_per_second, result.disk_bytes))]
    lines = []
    if result.reference_perplexity is not None:
        reference = (result.reference_perplexity, result.reference_tokens_per_second, result.reference_disk_bytes)
        rows.append(("reference", *_cells(*reference)))  # type: ignore[arg-type]
        lines = [
            f"KL divergence from the reference: {result.kl_divergence:.5f} nats/token",
            f"same first choice: {100 * (result.top1_agreement or 0):.2f} % of tokens",
        ]
    columns = ("", "perplexity", "tokens/s", "on disk")
    head = table(columns, rows, right=columns[1:])
    return "\n".join([head, *lines, f"over {result.tokens:,} tokens"])


def _cells(perplexity: float, speed: float, size: int) -> tuple[str, str, str]:
    return f"{perplexity:.3f}", f"{speed:,.0f}", in_bytes(size)
