"""`quantcore compare`: several checkpoints, or several configs of one, side by side on a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.eval import read_text, reading_options
from quantcore.cli.group import Verb
from quantcore.cli.method_verb import read_config_file
from quantcore.cli.methods import chosen_backend
from quantcore.cli.output import Output, in_bytes, output_options, table

if TYPE_CHECKING:
    from quantcore.evaluation.report import Evaluation
    from quantcore.quantization_config import QuantizationConfigMixin

EXAMPLES = (
    "quantcore compare examples/stdlib-lm stdlib-lm-hqq stdlib-lm-nf4 --text examples/stdlib-lm/eval.txt "
    "--max-tokens 4096",
    "quantcore compare examples/stdlib-lm --config stdlib-lm-hqq/config.json --text examples/stdlib-lm/eval.txt "
    "--max-tokens 4096",
)
_COLUMNS = ("", "size", "perplexity", "KL divergence", "same first choice", "tokens/s")


@click.command("compare", cls=Verb, examples=EXAMPLES)
@click.argument("reference", metavar="DIR")
@click.argument("directories", metavar="[DIR...]", nargs=-1)
@click.option("--text", metavar="FILE", required=True, help="UTF-8 text to predict")
@click.option(
    "--config",
    "configs",
    metavar="FILE",
    multiple=True,
    help="Compare the first model quantized so, too: a JSON file with a quantization_config. May be repeated.",
)
@reading_options
@output_options(brief="only the perplexities, a line for each model")
def command(
    reference: str, directories: tuple[str, ...], text: str, configs: tuple[str, ...], output: Output, **options: Any
) -> None:
    """Compare models on a text with the first, DIR: size, perplexity, KL divergence from it, tokens per second.

    The others are checkpoint folders, or the first one quantized in memory as each --config says.
    """
    if not directories and not configs:
        raise click.UsageError("nothing to compare with; give a second folder, or --config")
    candidates: list[str | QuantizationConfigMixin] = [*directories, *map(_config, configs)]
    content = read_text(Path(text))
    from quantcore.cli.progress import progress_bar
    from quantcore.evaluation.report import evaluate_beside

    with progress_bar(output) as update:
        results = evaluate_beside(
            reference,
            candidates,
            content,
            report=output.note,
            progress=lambda done, total: update(done, total, f"{done} of {total} tokens"),
            **options,
        )
        found = dict(zip([*directories, *configs], results, strict=True))
    rows = [{"model": reference, **_of_reference(next(iter(found.values())))}]
    rows += [{"model": name, **_of_model(result)} for name, result in found.items()]
    output.result(rows, lambda: _text(rows), "\n".join(f"{row['model']} {row['perplexity']:.4f}" for row in rows))


def _config(path: str) -> QuantizationConfigMixin:
    """The config in a file, which must need no data: what is measured here is made here."""
    content = read_config_file(path)
    if "quant_method" not in content:
        raise click.BadParameter(f"{path} names no quant_method", param_hint="--config")
    backend = chosen_backend(content["quant_method"], "--config")
    if backend.needs_calibration:
        raise click.BadParameter(
            f"{path}: {backend.method} quantizes with data; make a folder with quantcore quantize and compare that",
            param_hint="--config",
        )
    from quantcore.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(content)


def _of_model(result: Evaluation) -> dict[str, Any]:
    fields = dataclasses.asdict(result)
    return {name: value for name, value in fields.items() if not name.startswith("reference_")}


def _of_reference(result: Evaluation) -> dict[str, Any]:
    fields = dataclasses.asdict(result)
    own = {name.removeprefix("reference_"): value for name, value in fields.items() if name.startswith("reference_")}
    return {**own, "tokens": result.tokens, "kl_divergence": 0.0, "top1_agreement": 1.0}


def _text(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            row["model"],
            in_bytes(row["disk_bytes"]),
            f"{row['perplexity']:.3f}",
            f"{row['kl_divergence']:.5f}" if math.isfinite(row["kl_divergence"]) else "-",
            f"{100 * row['top1_agreement']:.2f} %",
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in rows
    ]
    body = table(_COLUMNS, cells, right=_COLUMNS[1:])
    return f"{body}\nover {rows[0]['tokens']:,} tokens; the first model is what the others are compared with"
