"""`quantcore compare`: several checkpoints, or several configs of one, side by side on a text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.completing import files, folders
from quantcore.cli.eval import READING_FLAGS, read_text, reading_options, text_option
from quantcore.cli.folders import check_places, told_in_flags
from quantcore.cli.group import Verb
from quantcore.cli.method_verb import read_config_file
from quantcore.cli.methods import chosen_backend
from quantcore.cli.output import Output, in_bytes, output_options, table
from quantcore.cli.report.options import Wanted, report_options

if TYPE_CHECKING:
    from torch import nn

    from quantcore.cli.report.looking import Looking
    from quantcore.quantization_config import QuantizationConfigMixin
    from quantcore.workflows.evaluation import Evaluation

EXAMPLES = (
    "quantcore compare examples/stdlib-lm stdlib-lm-hqq stdlib-lm-nf4 --text examples/stdlib-lm/eval.txt "
    "--max-tokens 4096",
    "quantcore compare examples/stdlib-lm --config stdlib-lm-hqq/config.json --text examples/stdlib-lm/eval.txt "
    "--max-tokens 4096",
    "quantcore compare examples/stdlib-lm stdlib-lm-hqq --text examples/stdlib-lm/eval.txt --max-tokens 4096 "
    "--html report.html --force",
)
_COLUMNS = ("", "size", "perplexity", "KL divergence", "same first choice", "tokens/s")


@click.command("compare", cls=Verb, examples=EXAMPLES)
@click.argument("reference", metavar="DIR", shell_complete=folders)
@click.argument("directories", metavar="[DIR...]", shell_complete=folders, nargs=-1)
@text_option
@click.option(
    "--config",
    "configs",
    metavar="FILE",
    shell_complete=files,
    multiple=True,
    help="Compare the first model quantized so, too: a JSON file with a quantization_config. May be repeated.",
)
@reading_options
@report_options(
    "size, quality, error, speed, memory, weights, codes-1 [default: size]",
    "the one with the largest error",
    needing={"prompts": "--prompt"},
)
@click.option(
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    help="What the report lets each model continue [default: two places of the text]. May be repeated.",
)
@output_options(brief="only the perplexities, a line for each model")
def command(
    reference: str,
    directories: tuple[str, ...],
    text: str,
    configs: tuple[str, ...],
    prompts: tuple[str, ...],
    report: Wanted,
    output: Output,
    **options: Any,
) -> None:
    """Compare models on a text with the first, DIR: size, perplexity, KL divergence from it, tokens per second.

    The others are checkpoint folders, or the first one quantized in memory as each --config says. With --html all of
    it becomes a page of pictures, with the error of each layer and what each model writes.
    """
    if not directories and not configs:
        raise click.UsageError("nothing to compare with; give a second folder, or --config")
    candidates: list[str | QuantizationConfigMixin] = [*directories, *map(_config, configs)]
    check_places([reference, *directories], device=options["device"])
    content = read_text(text, options["max_tokens"])
    from quantcore.cli.progress import progress_bar
    from quantcore.workflows.evaluation import evaluate_beside

    look = _looking(reference, content, report.layer, prompts, options) if report.any else None
    with progress_bar(output) as update, told_in_flags(READING_FLAGS):
        results = evaluate_beside(
            reference,
            candidates,
            content,
            report=output.note,
            progress=lambda done, total: update(done, total, f"{done} of {total} tokens"),
            examine=look.examine if look is not None else _look_at_nothing,
            **options,
        )
        found = dict(zip([*directories, *configs], results, strict=True))
    rows = [{"model": reference, **_of_reference(next(iter(found.values())))}]
    rows += [{"model": name, **_of_model(result)} for name, result in found.items()]
    if look is not None:
        look.write(report, rows, Path(text).name, output)
    output.result(rows, lambda: _text(rows), "\n".join(f"{row['model']} {row['perplexity']:.4f}" for row in rows))


def _look_at_nothing(model: nn.Module, reference: nn.Module) -> None:
    """What a comparison without a report has to see."""


def _looking(
    reference: str, text: str, layer: str | None, prompts: tuple[str, ...], options: dict[str, Any]
) -> Looking:
    from quantcore.cli.report.looking import Looking

    return Looking(reference, text, layer, prompts, options["window"], options["batch"])


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
    return {
        **own,
        "tokens": result.tokens,
        "kl_divergence": 0.0,
        "kl_interval": None,
        "ratio_interval": None,
        "top1_agreement": 1.0,
    }


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
