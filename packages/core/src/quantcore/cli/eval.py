"""`quantcore eval`: how good, how fast and how large a checkpoint is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.group import Verb
from quantcore.cli.output import Function, Output, in_bytes, output_options, table

if TYPE_CHECKING:
    from quantcore.evaluation.report import Evaluation

EXAMPLES = (
    "quantcore eval examples/stdlib-lm --text examples/stdlib-lm/eval.txt --max-tokens 4096",
    "quantcore eval stdlib-lm-hqq --text examples/stdlib-lm/eval.txt --reference examples/stdlib-lm",
)


_READING = (
    click.option(
        "--max-tokens", metavar="N", type=int, default=40_960, help="Tokens of the text to read [default: 40960]"
    ),
    click.option(
        "--window",
        metavar="N",
        type=int,
        default=256,
        help="Tokens predicted on their own, as one piece [default: 256]",
    ),
    click.option("--batch", metavar="N", type=int, default=8, help="Windows a forward pass [default: 8]"),
    click.option(
        "--dtype",
        type=click.Choice(("float32", "bfloat16", "float16")),
        help="Dtype to read float tensors in [default: that of the file]",
    ),
    click.option("--device", metavar="NAME", default="cpu", help="Where to run: cpu, cuda:0, auto [default: cpu]"),
)


def reading_options(function: Function) -> Function:
    """Decorator: the flags that say how much of the text is read, and how the model runs."""
    for option in reversed(_READING):
        function = option(function)
    return function


@click.command("eval", cls=Verb, examples=EXAMPLES)
@click.argument("directory", metavar="DIR")
@click.option("--text", metavar="FILE", required=True, help="UTF-8 text to predict")
@click.option("--reference", metavar="DIR", help="The model before quantizing, to compare with.")
@reading_options
@output_options(brief="only the perplexity")
def command(directory: str, text: str, output: Output, **options: Any) -> None:
    """Measure the checkpoint folder DIR on a text: perplexity, tokens per second, size on disk.

    With --reference also the perplexity and size of that model, the KL divergence from it, and how often both put the
    same token first.
    """
    content = read_text(Path(text))
    from quantcore.cli.progress import progress_bar
    from quantcore.evaluation.report import evaluate

    with progress_bar(output) as update:
        result = evaluate(
            directory,
            content,
            report=output.note,
            progress=lambda done, total: update(done, total, f"{done} of {total} tokens"),
            **options,
        )
    output.result(dataclasses.asdict(result), lambda: _text(result), f"{result.perplexity:.4f}")


def read_text(path: Path) -> str:
    """The text of a file; ValueError naming it for one that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} cannot be read; convert the file") from error


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
