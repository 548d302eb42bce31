"""`quantcore bench`: how fast each kernel runs a quantized linear layer on this machine."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.completing import files
from quantcore.cli.folders import check_device_flag, chosen_device
from quantcore.cli.method_verb import DTYPES, MethodVerb, chosen_config, method_option
from quantcore.cli.output import Output, output_options, table
from quantcore.plugins.backend import import_string
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantcore.evaluation.speed import Timing
    from quantcore.quantization_config import QuantizationConfigMixin

EXAMPLES = (
    "quantcore bench --method hqq --shapes 4096x4096 --rows 1,16",
    "quantcore bench --method bitsandbytes --load-in-4bit --dtype float32 --vs torch --json",
)
_COLUMNS = ("rows", "N x K", "kernel", "ms", "20-80 %", "GB/s", "of copy", "times as fast")


class _Shapes(click.ParamType):  # type: ignore[type-arg]
    name = "NxK,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word.strip()) for word in str(value).split(",")]
        if not all(shapes):
            self.fail(f"{value!r} is no list of shapes; write out_features x in_features as 4096x4096,11008x4096")
        return [(int(found[1]), int(found[2])) for found in shapes if found]


class _Rows(click.ParamType):  # type: ignore[type-arg]
    name = "M,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = [word.strip() for word in str(value).split(",")]
        if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
            self.fail(f"{value!r} is no list of numbers of rows; write 1,16,512")
        return [int(word) for word in words]


@click.command("bench", cls=MethodVerb, examples=EXAMPLES)
@method_option
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=files,
    help="Take the config from a JSON file, such as a model's config.json.",
)
@click.option("--shapes", type=_Shapes(), default="4096x4096", help="Weights, out x in features [default: 4096x4096]")
@click.option("--rows", type=_Rows(), default="1,16", help="Rows of input [default: 1,16]")
@click.option(
    "--vs",
    metavar="NAME",
    default="torch",
    help="Compare with torch's float layer, or with the upstream package of the method by the method's name "
    "[default: torch]",
)
@click.option("--device", "-d", metavar="NAME", default="cpu", help="Where to run: cpu, cuda:0, auto [default: cpu]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", help="Dtype of input [default: bfloat16]")
@output_options(brief="only the fastest kernel of each case")
def command(
    shapes: list[tuple[int, int]],
    rows: list[int],
    vs: str,
    device: str,
    dtype: str,
    output: Output,
    **flags: Any,
) -> None:
    """Time a linear layer of random weights under each kernel that serves it, beside a baseline.

    Times are of whole calls, on a GPU of its work in them, over copies of the weight that do not fit the cache
    together. GB/s counts the stored
    weight, input and output once; "of copy" is its share of what copying memory reaches on this device. Ends with 1
    where a kernel fails.
    """
    config = chosen_config(click.get_current_context())
    from quantcore.cli.progress import progress_bar
    from quantcore.evaluation import speed

    baseline, place = (vs, _baseline(vs, config)), _device(device)
    copy_speed = speed.copy_bandwidth(place)
    timings: list[Timing] = []
    with progress_bar(output) as update:
        for number, shape in enumerate(shapes):
            update(number, len(shapes), f"{shape[0]}x{shape[1]}")
            timings += speed.time_linear(config, shape, rows, _dtype(dtype), place, baseline, copy_speed)
    data = {
        "method": normalize_method(config.quant_method),
        "device": _device_name(place),
        "dtype": dtype,
        "copy_gigabytes_per_second": copy_speed / 1e9,
        "timings": [_record(timing) for timing in timings],
    }
    output.result(data, lambda: _text(data, timings), _fastest(timings, vs))
    if any(timing.fault for timing in timings):
        raise click.exceptions.Exit(1)


def _baseline(vs: str, config: QuantizationConfigMixin) -> Callable[[nn.Linear], nn.Module]:
    if vs == "torch":
        return lambda dense: dense
    backend = plugins().backend(normalize_method(config.quant_method))
    if vs != backend.method or not backend.upstream:
        known = ["torch", *([backend.method] if backend.upstream else [])]
        raise click.BadParameter(f"{vs!r} is none of {', '.join(known)}", param_hint="--vs")
    make = import_string(backend.upstream)
    return lambda dense: make(dense, config)


def _device(name: str) -> torch.device:
    import torch

    check_device_flag(name)
    return torch.device(chosen_device(name))


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _dtype(name: str) -> torch.dtype:
    from quantcore.formats.base import float_dtype

    return float_dtype(name, "--dtype")


def _record(timing: Timing) -> dict[str, Any]:
    return {**dataclasses.asdict(timing), "gigabytes_per_second": timing.gigabytes_per_second}


def _fastest(timings: list[Timing], vs: str) -> str:
    """A line for each case: its shape and rows, the fastest of our kernels, and how many times as fast it is."""
    best: dict[tuple[int, int, int], Timing] = {}
    for timing in timings:
        case = (timing.N, timing.K, timing.rows)
        if timing.kernel != vs and timing.times and not (case in best and best[case].ratio >= timing.ratio):
            best[case] = timing
    return "\n".join(f"{t.N}x{t.K} rows {t.rows}: {t.kernel} {t.ratio:.2f}" for t in best.values())


def _text(data: dict[str, Any], timings: list[Timing]) -> str:
    rows = [_cells(timing) for timing in timings if timing.times]
    refused: dict[str, dict[str, None]] = {}
    for timing in timings:
        if timing.reason:
            refused.setdefault(timing.reason, {})[timing.kernel] = None
    copying = f"{data['copy_gigabytes_per_second']:.1f} GB/s"
    head = f"{data['method']} in {data['dtype']} on {data['device']}, which copies {copying}"
    body = table(_COLUMNS, rows, right=("rows", *_COLUMNS[3:]))
    left = [f"left out: {', '.join(names)}: {why}" for why, names in refused.items()]
    failed = {
        f"failed, report this as a bug: {timing.kernel}: {timing.fault}": None for timing in timings if timing.fault
    }
    return "\n".join([head, body, *left, *failed])


def _cells(timing: Timing) -> tuple[str, ...]:
    assert timing.times is not None
    times, ratio = timing.times, "" if math.isnan(timing.ratio) else f"{timing.ratio:.2f}"
    return (
        str(timing.rows),
        f"{timing.N}x{timing.K}",
        timing.kernel,
        f"{times.median:.3f}",
        f"{times.low:.3f}-{times.high:.3f}",
        f"{timing.gigabytes_per_second:.1f}",
        f"{100 * timing.share:.0f} %",
        ratio,
    )
