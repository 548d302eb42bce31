"""`quantcore recommend`: which method, with which settings, for a model and a purpose."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.calibration import check_data
from quantcore.cli.candidates import compare_line
from quantcore.cli.group import Verb
from quantcore.cli.methods import brief_settings
from quantcore.cli.needs import USUAL_BITS, Needs, in_time, parse_seconds
from quantcore.cli.output import Output, in_bytes, output_options, plural, table
from quantcore.plugins.backend import PURPOSES

if TYPE_CHECKING:
    from quantcore.cli.shortlist import Advice, Candidate
    from quantcore.workflows.throughput import Rate

EXAMPLES = (
    "quantcore recommend examples/stdlib-lm",
    "quantcore recommend examples/stdlib-lm --for serving --serve-with vllm --bits 4",
    "quantcore recommend examples/stdlib-lm --memory 5MB --calibration examples/stdlib-lm/calibration.txt --json",
)
_COLUMNS = ("", "method", "settings", "bits/weight", "size", "error", "time", "tokens/s")
_SHOWN = 5  # rows of the short list
_SCALES = 0.75  # bits a weight that scales and offsets may take beside codes of whole bits
_REASONS = 12  # methods that are left out, named with the reason


@click.command("recommend", cls=Verb, examples=EXAMPLES)
@click.argument("source", metavar="MODEL")
@click.option("--for", "purpose", type=click.Choice(PURPOSES), help="What the model is for [default: inference]")
@click.option("--serve-with", "program", metavar="NAME", help="A program that shall read it: vllm, llama.cpp, mlx, ...")
@click.option("--memory", metavar="SIZE", help="What the weights may take, such as 6GB [default: what is free here]")
@click.option(
    "--bits",
    type=click.FloatRange(min=0, min_open=True),
    help="Bits a quantized weight may take; a whole number counts codes alone [default: by purpose]",
)
@click.option("--no-data", is_flag=True, help="Only what needs no calibration data.")
@click.option("--time", "time_limit", metavar="TIME", help="What quantizing may take, about, such as 90s, 10m, 2h")
@click.option("--calibration", metavar="FILE", help="UTF-8 text, or wikitext2, c4, pileval: weigh errors by it.")
@click.option("--method", "-m", "wanted", metavar="NAME", multiple=True, help="Only this method. May be repeated.")
@click.option("--all", "takes_all", is_flag=True, help="Every config that fits, and what is left out with its reason.")
@output_options(brief="only the command of the first")
def command(source: str, wanted: tuple[str, ...], takes_all: bool, output: Output, **options: Any) -> None:
    """Say which methods suit the float model MODEL, a folder or a hub id: the best first, each with its command.

    Methods are taken by what they are made for and by whom their files are read; of each, the examples and other bits
    and group sizes are tried. The smallest error that fits comes first, and for inference the faster here of errors
    within 5 %; for the purpose smallest, the smallest size that still works. Errors are measured on a sample, some rows
    of a layer of each kind: of the weights, or with --calibration of what the layers give for that text, calibrated
    where a method calibrates. Without a text, what calibration
    gains is taken from a rule of the method.
    """
    from quantcore.checkpoints.read import resolve
    from quantcore.cli.advice import advise

    if options["calibration"] is not None:
        check_data(options["calibration"])
    needs = _needs(options)
    directory = resolve(source)
    advice = advise(source, directory, wanted, needs, options["calibration"], output)
    rows = advice.fitting if takes_all else advice.best[:_SHOWN]
    if not rows:
        raise ValueError(_nothing(source, advice))
    shown = [*rows, *advice.refused] if takes_all else rows
    data = [each.to_dict() for each in shown]
    output.result(data, lambda: _text(source, advice, rows, options["calibration"], takes_all), rows[0].command)


def _needs(options: Mapping[str, Any]) -> Needs:
    from quantcore.checkpoints.write import parse_size

    purpose, bits, memory = options["purpose"] or "inference", options["bits"], options["memory"]
    try:
        size = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--memory") from error
    try:
        seconds = None if options["time_limit"] is None else parse_seconds(options["time_limit"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--time") from error
    if bits is not None:
        limit = bits + _SCALES if bits == int(bits) else bits
    else:
        limit = None if size is not None else USUAL_BITS[purpose]
    program = None if options["program"] is None else options["program"].lower()
    return Needs(purpose, program, size, limit, options["no_data"], seconds, is_usual=bits is None)


def _nothing(source: str, advice: Advice) -> str:
    """Why no config is left, and what would help: the reasons that refuse the most, and the smallest there is."""
    smallest = min(advice.refused, key=lambda each: each.file_bytes, default=None)
    if smallest is None:
        return f"{source}: no installed method fits this model; quantcore list shows what can be installed"
    reasons = "; ".join(f"{method} {reason}" for method, reason in list(advice.left_out().items())[:4])
    return (
        f"{source}: no method does all that is asked: {reasons}; the smallest is {in_bytes(smallest.file_bytes)}, by "
        f"{smallest.method}; ask for less, allow more memory, or install more methods"
    )


def _text(source: str, advice: Advice, rows: list[Candidate], text: str | None, takes_all: bool) -> str:
    cells = [
        (
            str(number),
            each.method,
            brief_settings(each.config),
            f"{each.bits_per_weight:.2f}",
            in_bytes(each.file_bytes),
            f"{100 * each.error:.2f} %" if math.isfinite(each.error) else "-",
            in_time(each.seconds) if math.isfinite(each.seconds) else "-",
            _tokens(each.rate),
        )
        for number, each in enumerate(rows, 1)
    ]
    parts = [_head(source, advice), table(_COLUMNS, cells, right=_COLUMNS[3:]), _speed(advice)]
    parts += [_in_words(number, each) for number, each in enumerate(rows[:_SHOWN], 1)]
    others = advice.left_out()
    if others:
        lines = [f"  {method} {reason}" for method, reason in others.items()]
        more = [f"  and {len(lines) - _REASONS} more, see --all"] if len(lines) > _REASONS and not takes_all else []
        parts.append("\n".join(["not taken:", *(lines[:_REASONS] if more else lines), *more]))
    if text is None and any(each.calibrates for each in rows):
        parts.append(
            "Gains of calibration are taken from a rule; with --calibration TEXT they are measured on this model."
        )
    parts.append(f"How good one is, measured and in pictures:\n   {compare_line(source, rows[0].command)}")
    return "\n\n".join(parts)


def _head(source: str, advice: Advice) -> str:
    model, needs = advice.model, advice.needs
    limits = [] if needs.bits is None else [f"at most {needs.bits:g} bits a weight"]
    limits += [f"at most {in_bytes(needs.memory)}"] if needs.memory is not None else []
    asked = ", ".join([f"for {needs.purpose}", *limits])
    experts = f", {plural(model.experts, 'expert')}" if model.experts else ""
    return (
        f"{source}: {model.name}{experts}, {model.parameters:,} weights, {in_bytes(model.bytes)}\n"
        f"this machine: {plural(os.cpu_count() or 1, 'core')}, {in_bytes(advice.free)} of memory free, {_gpus()}\n"
        f"{asked}; the best config of each method"
    )


def _tokens(rate: Rate) -> str:
    return f"{rate.tokens:,.3g}" if math.isfinite(rate.tokens) else "-"


def _speed(advice: Advice) -> str:
    """What the tokens a second are, with the float model's."""
    plain = _tokens(advice.float_rate)
    return (
        "tokens/s: an estimate for one text at a time, of the linear layers alone, from a few of them timed here; "
        f"of the float model {plain}.{_hint()}"
    )


def _hint() -> str:
    """What makes a CPU faster, where it is not there."""
    import torch

    from quantcore._metadata import metadata
    from quantcore.distribution import distribution_of, install_hint

    if torch.cuda.is_available():
        return ""
    try:
        metadata.version(distribution_of("cpu"))
    except metadata.PackageNotFoundError:
        return f" Native kernels for CPUs are not installed: {install_hint('cpu')}"
    return " The native kernels for CPUs are installed."


def _gpus() -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names) or "no GPU"


def _in_words(number: int, each: Candidate) -> str:
    guide = each.facts.backend.guide
    lines = [f"{number}. {each.method} {brief_settings(each.config)}"]
    lines += [f"   why: {each.why}"] if each.why else []
    against = " ".join([*([guide.cons] if guide.cons else []), *([f"{each.remark}."] if each.remark else [])])
    lines += [f"   why not: {against}"] if against else []
    readers = "; ".join(f"{name} {how}" for name, how in each.facts.programs.items())
    data = "calibrates on a text" if each.calibrates else "needs no data"
    took = f", about {in_time(each.seconds)}" if math.isfinite(each.seconds) else ""
    adapters = "LoRA trains on it" if each.facts.trains else "LoRA does not train on it"
    lines += [f"   {data}{took}; {adapters}; read by {readers}", f"   {each.command}"]
    return "\n".join(lines)
