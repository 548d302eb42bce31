"""`quantcore quantize`: a float checkpoint folder becomes a quantized one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcore import settings
from quantcore.cli.calibration import (
    calibrating_bar,
    calibration_from,
    calibration_options,
    check_seqlen,
    chosen_data,
    report_text,
)
from quantcore.cli.completing import files, folders
from quantcore.cli.folders import check_places, check_size, check_space, chosen_device
from quantcore.cli.method_verb import DTYPES, MethodVerb, chosen_config, method_option
from quantcore.cli.mixed import budget_options, is_budgeted, mixture_for, mixture_text, without_weighing
from quantcore.cli.output import Output, in_bytes, output_options, plural
from quantcore.cli.progress import quantizing_bar
from quantcore.cli.serving import servable, serving_option
from quantcore.cli.sizes import size_table
from quantcore.plugins.known import normalize_method
from quantcore.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from quantcore.calibration.report import CalibrationReport
    from quantcore.cli.estimate import Sizes

EXAMPLES = (
    "quantcore quantize examples/stdlib-lm stdlib-lm-nf4 --method bitsandbytes --bnb-4bit-quant-type nf4",
    "quantcore quantize examples/stdlib-lm --method hqq --nbits 3 --group-size 64 --dry-run",
    "quantcore quantize examples/stdlib-lm stdlib-lm-gptq --method gptq --bits 4 --group-size 32 "
    "--calibration examples/stdlib-lm/calibration.txt --samples 16 --seqlen 128",
)


@click.command("quantize", cls=MethodVerb, examples=EXAMPLES)
@click.argument("source", metavar="IN", shell_complete=folders)
@click.argument("target", metavar="OUT", shell_complete=folders, required=False)
@method_option
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=files,
    help="JSON file with a quantization_config, instead of flags of the method.",
)
@click.option(
    "--dry-run", "-n", is_flag=True, help="Print size, bits per weight and what stays float; read no weights."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Dtype to read the float weights in [default: that of the file]"
)
@click.option(
    "--device", "-d", metavar="NAME", default="cpu", help="Where to quantize: cpu, cuda:0, auto [default: cpu]"
)
@budget_options
@calibration_options
@serving_option
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Largest file to write [default: 5GB]")
@click.option("--force", "-f", is_flag=True, help="Replace OUT if it is there.")
@output_options(brief="only the folder that was made")
def command(source: str, target: str | None, dry_run: bool, output: Output, **options: Any) -> None:
    """Quantize the float model IN and write the result to the folder OUT.

    IN is a folder with config.json and safetensors files, or the id of such a model on the hub.
    """
    config = chosen_config(click.get_current_context())
    if target is None and not dry_run:
        raise click.UsageError("argument OUT is missing: the folder to write; or ask for --dry-run")
    check_places([source], target, options["force"], options["device"])
    check_size(options["max_shard_size"])
    if options["serve_with"] is not None:
        config = servable(config, options["serve_with"], None if target is None else Path(target))
    if is_budgeted(options):
        own = without_weighing(config, options)
        chosen_data(config, own, is_needed=not dry_run)
        mixture = mixture_for(source, config, options, output)
        output.note(mixture_text(mixture))
        config, options = mixture.config, own
    if dry_run:
        if chosen_data(config, options, is_needed=False) is not None:
            from quantcore.checkpoints.read import resolve

            check_seqlen(resolve(source), options["seqlen"])
        _dry_run(source, config, options["dtype"], output)
    else:
        assert target is not None
        _quantize(source, Path(target), config, output, options)


def _dry_run(source: str, config: QuantizationConfigMixin, dtype: str | None, output: Output) -> None:
    from quantcore.cli.estimate import sizes_of
    from quantcore.workflows.quantize import float_quantizer, open_float

    sizes = sizes_of(open_float(source, dtype=dtype).planned(float_quantizer(config)))
    data = {"method": _name(config), "dry_run": True, **sizes.to_dict()}
    output.result(data, lambda: f"{_summary(sizes)}\n\nNothing was written: this is a dry run.", str(sizes.bytes))


def _quantize(
    source: str, target: Path, config: QuantizationConfigMixin, output: Output, options: Mapping[str, Any]
) -> None:
    start = time.perf_counter()
    output.note(f"reading {source}")
    from quantcore.calibration.report import report_of
    from quantcore.checkpoints.read import resolve
    from quantcore.cli.estimate import measure, sizes_of
    from quantcore.cli.model_card import Made, write_card
    from quantcore.quantizers.plan import by_reason
    from quantcore.workflows.evaluation import disk_bytes
    from quantcore.workflows.quantize import float_quantizer, open_float

    directory = resolve(source)
    calibration = calibration_from(config, options, directory)
    planned = open_float(directory, dtype=options["dtype"]).planned(float_quantizer(config))
    expected = sizes_of(planned)
    check_space(target, expected.bytes)
    output.note(f"quantizing {plural(expected.layers, 'layer')} with {_name(config)} into {target}")
    writing = {
        "device": chosen_device(options["device"]),
        "max_shard_size": options["max_shard_size"],
        "overwrite": options["force"],
    }
    if calibration is None:
        with quantizing_bar(expected.weights, output):
            planned.write(target, **writing)
    else:
        with calibrating_bar(calibration, output) as shown:
            planned.write(target, **writing, calibration=shown)
    if not settings.is_first_process():
        return
    model = None if calibration is None else planned.skeleton  # on meta, with the formats that its layers got
    sizes, seconds = measure(target, expected, model), time.perf_counter() - start
    files, before = disk_bytes(target), disk_bytes(directory)
    data = {"output": str(target), "method": _name(config), "seconds": seconds, "file_bytes": files, **sizes.to_dict()}
    texts = [_summary(sizes), _made(target, files, before, seconds)]
    report = None if model is None else report_of(model)
    read = None if report is None else _data_text(options, config, report)
    bits = sizes.bits_per_quantized_weight
    made = Made(target, source, _name(config), sizes.config, files, before, bits, read, by_reason(sizes.left))
    write_card(made, directory)
    if report is not None:
        data["calibration"] = dataclasses.asdict(report)
        texts.insert(0, report_text(report))
    output.result(data, lambda: "\n\n".join(texts), str(target))


def _data_text(options: Mapping[str, Any], config: QuantizationConfigMixin, report: CalibrationReport) -> str:
    """What a model was calibrated on, for its card."""
    name = options["calibration"] or getattr(config, "dataset", None)
    shown = Path(name).name if isinstance(name, str) else "texts of the config"
    tokens = f", {report.tokens:,} tokens" if report.tokens else ""
    return f"{shown}: {plural(report.samples, 'row')}{tokens}"


def _made(target: Path, files: int, before: int, seconds: float) -> str:
    size = f"{in_bytes(files)}, was {in_bytes(before)}"
    return f"made {target}: {size}, in {seconds:.1f} s; load it with quantcore.load({str(target)!r})"


def _summary(sizes: Sizes) -> str:
    from quantcore.quantizers.plan import by_reason

    rows = (
        (f"quantized ({plural(sizes.layers, 'layer')})", sizes.weights, sizes.quantized_bytes),
        ("stays float", sizes.parameters - sizes.weights, sizes.bytes - sizes.quantized_bytes),
        ("whole model", sizes.parameters, sizes.bytes),
    )
    lines = [size_table(rows)]
    lines += [f"format ({plural(count, 'layer')}): {name}" for name, count in sizes.formats.items()]
    lines += [f"linear layers that stay float: {line}" for line in by_reason(sizes.left)]
    return "\n".join(lines)


def _name(config: QuantizationConfigMixin) -> str:
    return normalize_method(config.quant_method)
