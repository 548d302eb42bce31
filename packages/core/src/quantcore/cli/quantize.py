"""`quantcore quantize`: a float checkpoint folder becomes a quantized one."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import quantcore
from quantcore.cli.calibration import calibrating_bar, calibration_from, calibration_options, report_text
from quantcore.cli.folders import check_target
from quantcore.cli.method_verb import DTYPES, MethodVerb, chosen_config
from quantcore.cli.output import Output, in_bytes, output_options, plural
from quantcore.cli.progress import quantizing_bar
from quantcore.cli.sizes import size_table
from quantcore.plugins.known import normalize_method
from quantcore.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from quantcore.cli.estimate import Sizes

EXAMPLES = (
    "quantcore quantize examples/stdlib-lm stdlib-lm-nf4 --method bitsandbytes --bnb-4bit-quant-type nf4",
    "quantcore quantize examples/stdlib-lm --method hqq --nbits 3 --group-size 64 --dry-run",
    "quantcore quantize examples/stdlib-lm stdlib-lm-gptq --method gptq --bits 4 --group-size 32 "
    "--calibration examples/stdlib-lm/calibration.txt --samples 16 --seqlen 128",
)


@click.command("quantize", cls=MethodVerb, examples=EXAMPLES)
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", required=False)
@click.option("--method", metavar="NAME", help="Method to quantize with; quantcore list shows them.")
@click.option("--config", metavar="FILE", help="JSON file with a quantization_config, instead of flags of the method.")
@click.option("--dry-run", is_flag=True, help="Print size, bits per weight and what stays float; read no weights.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Dtype to read the float weights in [default: that of the file]"
)
@click.option("--device", metavar="NAME", default="cpu", help="Where to quantize: cpu, cuda:0, auto [default: cpu]")
@calibration_options
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Largest file to write [default: 5GB]")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@output_options(brief="only the folder that was made")
def command(source: str, target: str | None, dry_run: bool, output: Output, **options: Any) -> None:
    """Quantize the float model IN and write the result to the folder OUT.

    IN is a folder with config.json and safetensors files, or the id of such a model on the hub.
    """
    config = chosen_config(click.get_current_context(), output)
    if dry_run:
        _dry_run(source, config, options["dtype"], output)
    elif target is None:
        raise click.UsageError("argument OUT is missing: the folder to write; or ask for --dry-run")
    else:
        _quantize(source, Path(target), config, output, options)


def _dry_run(source: str, config: QuantizationConfigMixin, dtype: str | None, output: Output) -> None:
    from quantcore.checkpoints.read import resolve
    from quantcore.cli.estimate import estimate

    sizes = estimate(resolve(source), config, dtype)
    data = {"method": _name(config), "dry_run": True, **sizes.to_dict()}
    output.result(data, lambda: f"{_summary(sizes)}\n\nNothing was written: this is a dry run.", str(sizes.bytes))


def _quantize(
    source: str, target: Path, config: QuantizationConfigMixin, output: Output, options: Mapping[str, Any]
) -> None:
    start = time.perf_counter()
    check_target(target, source, options["force"])
    output.note(f"reading {source}")
    from quantcore.calibration.report import report_of
    from quantcore.checkpoints.read import resolve
    from quantcore.checkpoints.write import parse_size
    from quantcore.cli.estimate import estimate, measure

    parse_size(options["max_shard_size"])  # before the work, for it is needed after it
    directory = resolve(source)
    calibration = calibration_from(config, options, directory)
    expected = estimate(directory, config, options["dtype"])
    output.note(f"quantizing {plural(expected.layers, 'layer')} with {_name(config)} into {target}")
    writing = {"max_shard_size": options["max_shard_size"], "overwrite": options["force"]}
    model = None
    if calibration is None:
        device = _device(options["device"])
        with quantizing_bar(expected.weights, output):
            quantcore.quantize_checkpoint(directory, target, config, device=device, dtype=options["dtype"], **writing)
    else:
        with calibrating_bar(calibration, output) as arguments:
            model = quantcore.load(directory, device_map=options["device"], dtype=options["dtype"])
            quantcore.quantize(model, config, **arguments)
            quantcore.save(model, target, companions_from=directory, **writing)
    sizes, seconds = measure(target, expected, model), time.perf_counter() - start
    data = {"output": str(target), "method": _name(config), "seconds": seconds, **sizes.to_dict()}
    texts = [_summary(sizes), _made(target, sizes, seconds)]
    report = None if model is None else report_of(model)
    if report is not None:
        data["calibration"] = dataclasses.asdict(report)
        texts.insert(0, report_text(report))
    output.result(data, lambda: "\n\n".join(texts), str(target))


def _device(name: str) -> str:
    """Where single weights are quantized; "auto": on a GPU if there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _made(target: Path, sizes: Sizes, seconds: float) -> str:
    size = f"{in_bytes(sizes.bytes)}, was {in_bytes(sizes.bytes_before)}"
    return f"made {target}: {size}, in {seconds:.1f} s; load it with quantcore.load({str(target)!r})"


def _summary(sizes: Sizes) -> str:
    rows = (
        (f"quantized ({plural(sizes.layers, 'layer')})", sizes.weights, sizes.quantized_bytes),
        ("stays float", sizes.parameters - sizes.weights, sizes.bytes - sizes.quantized_bytes),
        ("whole model", sizes.parameters, sizes.bytes),
    )
    lines = [size_table(rows)]
    lines += [f"format ({plural(count, 'layer')}): {name}" for name, count in sizes.formats.items()]
    lines += [f"linear layers that stay float: {line}" for line in _reasons(sizes.left)]
    return "\n".join(lines)


def _reasons(left: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the names of the first few layers."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in left.items():
        by_reason[reason].append(name)
    shown = 4
    return [
        f"{', '.join(names[:shown])}{f' and {len(names) - shown} more' if len(names) > shown else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


def _name(config: QuantizationConfigMixin) -> str:
    return normalize_method(config.quant_method)
