"""The flags of calibration, its progress bar, and the table of what was done to the layers."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantcore.cli.completing import files
from quantcore.cli.folders import check_folder_flag, text_of, told_in_flags
from quantcore.cli.output import Output, plural, table
from quantcore.cli.progress import progress_bar
from quantcore.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from quantcore.calibration.data import Calibration
    from quantcore.calibration.progress import Progress
    from quantcore.calibration.report import CalibrationReport, LayerReport

Function = TypeVar("Function", bound=Callable[..., Any])

_FLAGS = ("samples", "seqlen", "batch_size", "offload", "max_memory", "resume")
CALIBRATION_FLAGS = {  # by argument of `Calibration`
    "seqlen": "--seqlen",
    "batch_size": "--batch-size",
    "max_memory": "--max-memory",
    "resume_dir": "--resume",
}
_SHOWN_FALLBACKS = 6


def calibration_options(function: Function) -> Function:
    """Decorator: the flags of a verb that may calibrate; `calibration_from` reads them."""
    options = (
        click.option(
            "--calibration",
            metavar="FILE",
            shell_complete=files,
            help="UTF-8 text for methods that calibrate, or wikitext2, c4, pileval.",
        ),
        click.option("--samples", metavar="N", type=click.IntRange(1), help="Rows of that text to use [default: 128]"),
        click.option("--seqlen", metavar="N", type=click.IntRange(1), help="Tokens of a row [default: 2048 at most]"),
        click.option("--batch-size", metavar="N", type=click.IntRange(1), help="Rows of a forward pass."),
        click.option(
            "--offload", metavar="DIR", help="Keep activations in files in DIR; disk: where temporary files are."
        ),
        click.option(
            "--max-memory",
            metavar="SIZE",
            help="Most that a block takes, such as 8GB; layers of a larger one take turns.",
        ),
        click.option(
            "--resume", metavar="DIR", help="Keep finished blocks in DIR [default: in a hidden folder beside OUT]"
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def calibration_from(
    config: QuantizationConfigMixin, options: Mapping[str, Any], tokenizer_from: Path
) -> Calibration | None:
    """The calibration that the flags ask for; None for a method that needs none.

    Errors as for `chosen_data` and `check_seqlen`.
    """
    data = chosen_data(config, options)
    if data is None:
        return None
    check_seqlen(tokenizer_from, options["seqlen"])
    from quantcore.calibration.data import Calibration
    from quantcore.integrations.transformers import load_tokenizer

    return Calibration(
        data,
        tokenizer=load_tokenizer(tokenizer_from),
        samples=options["samples"],
        seqlen=options["seqlen"],
        batch_size=options["batch_size"],
        resume_dir=options["resume"],
        offload=options["offload"],
        max_memory=options["max_memory"],
    )


def chosen_data(config: QuantizationConfigMixin, options: Mapping[str, Any], is_needed: bool = True) -> Any:
    """The data that the flags or the config ask for, checked; None for a method that needs none.

    is_needed: whether a method that calibrates must have some. Raises click.UsageError for data that is missing, or
    given to a method that takes none, and for flags of calibration that cannot be, before any work is done.
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
    if file is not None and quantizer.default_data is not None:
        found = quantizer.default_data
        name = found[0] if isinstance(found, list) and len(found) == 1 else found
        named = (
            f"--dataset {name!s:.60}" if options.get("config") is None else f"the dataset of --config, {name!r:.60},"
        )
        raise click.UsageError(f"--calibration {file} and {named} both say what to calibrate on; give one")
    _check_settings(options)
    data = quantizer.default_data if file is None else file
    return None if data is None and not is_needed else check_data(data, from_config=file is None)


def check_data(data: Any, from_config: bool = False) -> Any:
    """The data that a flag names, as a file or by a customary name; what cannot be read is told before any work."""
    from quantcore.calibration.datasets import DATASETS, check_named

    if data is None:
        raise click.UsageError(
            "this method calibrates: flag --calibration is missing, a file of UTF-8 text or one of "
            f"{', '.join(DATASETS)}"
        )
    name = data[0] if isinstance(data, list) and len(data) == 1 else data
    if not isinstance(name, str):
        return data
    if name in DATASETS:
        check_named(name)
        return name
    if from_config and not Path(name).is_file():
        if len(name.split()) != 1:
            return data  # texts
        raise click.UsageError(f"dataset {name!r} is one word, and no data set that is known: {', '.join(DATASETS)}")
    if Path(name).exists() or len(Path(name).parts) > 1 or Path(name).suffix:
        text_of(name, "dataset" if from_config else "--calibration")
        return Path(name)
    raise click.UsageError(
        f"--calibration {name}: no such file, and no data set of that name; known: {', '.join(DATASETS)}"
    )


def check_seqlen(directory: Path, seqlen: int | None) -> None:
    """Raise click.BadParameter for rows that are longer than what the model in a folder reads."""
    from quantcore.checkpoints.read import positions, read_config

    most = positions(read_config(directory))
    if seqlen is not None and most is not None and seqlen > most:
        raise click.BadParameter(f"{seqlen} is more than the {most} positions of the model", param_hint="--seqlen")


def _check_settings(options: Mapping[str, Any]) -> None:
    """Raise click.BadParameter for a flag of calibration whose value cannot be used."""
    from quantcore.checkpoints.write import parse_size

    check_folder_flag(options["resume"], "--resume")
    if options["offload"] != "disk":
        check_folder_flag(options["offload"], "--offload")
    if options["max_memory"] is not None:
        try:
            parse_size(options["max_memory"])
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--max-memory") from error


@contextlib.contextmanager
def calibrating_bar(calibration: Calibration, output: Output) -> Iterator[Calibration]:
    """While the block calibrates a model, a bar with block, layer and loss. Gives the calibration that moves it.

    When the user interrupts, it is said how to go on. Errors name the flags.
    """
    with progress_bar(output) as update, told_in_flags(CALIBRATION_FLAGS):

        def show(progress: Progress) -> None:
            update(progress.weights, progress.of_weights, _label(progress))

        try:
            yield dataclasses.replace(calibration, progress=show)
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
        return (
            "the same command goes on from the finished blocks, kept beside OUT; with --resume DIR they are kept there"
        )
    return f"the same command, with --resume {calibration.resume_dir}, goes on from the finished blocks"


def _figures(lines: Sequence[LayerReport]) -> tuple[str, str]:
    losses = [line.loss for line in lines if line.loss is not None]
    loss = f"{math.fsum(losses) / len(losses):.4g}" if losses else "-"
    return loss, f"{math.fsum(line.seconds or 0 for line in lines):.1f}"
