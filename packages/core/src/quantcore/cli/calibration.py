"""The flags of calibration, its progress bar, and the table of what was done to the layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantcore.cli.output import Output, plural, table
from quantcore.cli.progress import progress_bar
from quantcore.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from quantcore.calibration.data import Calibration
    from quantcore.calibration.progress import Progress
    from quantcore.calibration.report import CalibrationReport, LayerReport

Function = TypeVar("Function", bound=Callable[..., Any])

_FLAGS = ("samples", "seqlen", "batch_size", "resume")
_SHOWN_FALLBACKS = 6


def calibration_options(function: Function) -> Function:
    """Decorator: the flags of a verb that may calibrate; `calibration_from` reads them."""
    options = (
        click.option("--calibration", metavar="FILE", help="UTF-8 text for methods that calibrate."),
        click.option("--samples", metavar="N", type=click.IntRange(1), help="Rows of that text to use [default: 128]"),
        click.option("--seqlen", metavar="N", type=click.IntRange(1), help="Tokens of a row [default: 2048 at most]"),
        click.option("--batch-size", metavar="N", type=click.IntRange(1), help="Rows of a forward pass."),
        click.option("--resume", metavar="DIR", help="Keep finished blocks in DIR, and go on from those it holds."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def calibration_from(
    config: QuantizationConfigMixin, options: Mapping[str, Any], tokenizer_from: Path
) -> Calibration | None:
    """The calibration that the flags ask for; None for a method that needs none.

    Raises click.UsageError for data that is missing, or given to a method that takes none, before any work is done.
    """
    from quantcore.quantizers.auto import AutoHfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    file = options["calibration"]
    if not isinstance(quantizer, CalibratedQuantizer) or not quantizer.needs_data:
        given = [name for name in ("calibration", *_FLAGS) if options[name] is not None]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"this method takes no calibration data; leave {flags} out")
        return None
    if file is not None:
        Path(file).open().close()  # what cannot be read is told before any work
    data = quantizer.default_data if file is None else Path(file)
    if data is None:
        raise click.UsageError("this method calibrates: flag --calibration is missing, a file of UTF-8 text")
    from quantcore.calibration.data import Calibration
    from quantcore.integrations.transformers import load_tokenizer

    return Calibration(
        data,
        tokenizer=load_tokenizer(tokenizer_from),
        samples=options["samples"],
        seqlen=options["seqlen"],
        batch_size=options["batch_size"],
        resume_dir=options["resume"],
    )


@contextlib.contextmanager
def calibrating_bar(calibration: Calibration, output: Output) -> Iterator[dict[str, Any]]:
    """While the block calibrates a model, a bar with block, layer and loss. Gives arguments to quantize.

    When the user interrupts, it is said how to go on.
    """
    with progress_bar(output) as update:

        def show(progress: Progress) -> None:
            update(progress.weights, progress.of_weights, _label(progress))

        try:
            yield {"calibration": calibration, "progress": show}
        except KeyboardInterrupt:
            output.note(_how_to_go_on(calibration))
            raise


def report_text(report: CalibrationReport) -> str:
    """A row for each kind of layer, then what was not solved in the usual way."""
    kinds: dict[tuple[str, str], list[LayerReport]] = {}
    for line in report.layers:
        kinds.setdefault((line.name.rpartition(".")[2], line.method), []).append(line)
    rows = [(name, method, len(lines), *_figures(lines)) for (name, method), lines in kinds.items()]
    columns = ("layer", "solved by", "count", "mean loss", "seconds")
    tokens = f" with {report.tokens:,} tokens" if report.tokens else ""
    head = f"calibrated on {plural(report.samples, 'row')}{tokens} in {report.seconds:.1f} s"
    lines = [head, table(columns, rows, right=columns[2:])]
    fallbacks = report.fallbacks
    lines += [f"{line.name}: {line.method}, for {line.reason}" for line in fallbacks[:_SHOWN_FALLBACKS]]
    if len(fallbacks) > _SHOWN_FALLBACKS:
        lines.append(f"... and {len(fallbacks) - _SHOWN_FALLBACKS} more; --json shows all")
    return "\n".join(lines)


def _label(progress: Progress) -> str:
    loss = "" if progress.loss is None else f" loss {progress.loss:.3g}"
    return f"block {progress.block}/{progress.blocks} {progress.layer}{loss}"


def _how_to_go_on(calibration: Calibration) -> str:
    if calibration.resume_dir is None:
        return "interrupted; with --resume DIR finished blocks are kept"
    return f"interrupted; the same command goes on from the finished blocks in {calibration.resume_dir}"


def _figures(lines: Sequence[LayerReport]) -> tuple[str, str]:
    losses = [line.loss for line in lines if line.loss is not None]
    loss = f"{math.fsum(losses) / len(losses):.4g}" if losses else "-"
    return loss, f"{math.fsum(line.seconds or 0 for line in lines):.1f}"
