"""`quantcore recommend`: which configs of the installed methods bring a model into a given memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.group import Verb
from quantcore.cli.methods import brief_settings, chosen_backend
from quantcore.cli.output import Output, in_bytes, output_options, table
from quantcore.cli.progress import progress_bar
from quantcore.errors import QuantcoreError
from quantcore.plugins import Backend
from quantcore.plugins.discovery import methods

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from quantcore.checkpoints.read import Checkpoint
    from quantcore.quantizers.plan import Plan, PlannedLayer

EXAMPLES = (
    "quantcore recommend examples/stdlib-lm --memory 5MB",
    "quantcore recommend examples/stdlib-lm --memory 5MB --method hqq --json",
)
_COLUMNS = ("method", "settings", "bits/weight", "size", "error", "")
_LAYERS, _ROWS = 4, 256  # of the sample on which errors are measured


@dataclass(frozen=True)
class Candidate:
    """A config that fits. error: |W - Wq| / |W| on a sample of the model's weights, each rounded as it is."""

    method: str
    config: Mapping[str, Any]
    bits_per_weight: float
    bytes: int
    error: float
    calibrates: bool


@click.command("recommend", cls=Verb, examples=EXAMPLES)
@click.argument("source", metavar="DIR")
@click.option("--memory", metavar="SIZE", required=True, help="What the weights may take, such as 6GB")
@click.option("--method", "wanted", metavar="NAME", multiple=True, help="Only this method. May be repeated.")
@output_options(brief="only the method of the first")
def command(source: str, memory: str, wanted: tuple[str, ...], output: Output) -> None:
    """List the example configs of the installed methods with which the float model DIR takes no more than --memory.

    The smallest error comes first. Sizes are of the weights alone: activations and the cache of keys and values come
    besides. Errors are measured on a sample of the model's own weights, by rounding; calibration lowers them where a
    method calibrates. Whether the model is still good, quantcore compare tells.
    """
    from quantcore.checkpoints.read import resolve
    from quantcore.checkpoints.write import parse_size

    budget = parse_size(memory)
    directory = resolve(source)
    found = _measured(directory, wanted, output)
    fitting = sorted((each for each in found if each.bytes <= budget), key=lambda each: (each.error, each.bytes))
    if not fitting:
        smallest = min(found, key=lambda each: each.bytes, default=None)
        least = f"the smallest is {in_bytes(smallest.bytes)}, by {smallest.method}" if smallest else "no config fits it"
        raise ValueError(f"{source} does not fit {memory}: {least}; allow more memory, or install more methods")
    output.result([dataclasses.asdict(each) for each in fitting], lambda: _text(fitting), fitting[0].method)


def _measured(directory: Path, wanted: tuple[str, ...], output: Output) -> list[Candidate]:
    """Every config that the model's shapes allow; of the others a note is left."""
    from quantcore.cli.estimate import float_skeleton, foresee
    from quantcore.quantizers.auto import AutoQuantizationConfig

    model, checkpoint = float_skeleton(directory)
    configs, found, sample = list(_configs(wanted)), [], _Sample(checkpoint)
    with progress_bar(output) as update:
        for number, (backend, config) in enumerate(configs):
            update(number, len(configs), backend.method)
            try:
                full = AutoQuantizationConfig.from_dict({"quant_method": backend.method, **config})
                sizes, plan = foresee(model, full)
                error = sample.error(plan)
            except (QuantcoreError, ValueError, TypeError) as refusal:
                first, *_ = str(refusal).splitlines()
                output.note(f"left out: {backend.method} {brief_settings(config)}: {first}")
                continue
            bits = sizes.bits_per_quantized_weight
            found.append(Candidate(backend.method, dict(config), bits, sizes.bytes, error, backend.needs_calibration))
    return found


def _configs(wanted: tuple[str, ...]) -> Iterator[tuple[Backend, Mapping[str, Any]]]:
    names = wanted or [info.method for info in methods() if info.installed]
    for name in names:
        backend = chosen_backend(name, "--method")
        yield from ((backend, config) for config in backend.example_configs)


class _Sample:
    """Some rows of some layers of a checkpoint, read when they are first asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._weights: dict[str, Tensor] = {}

    def error(self, plan: Plan) -> float:
        """|W - Wq| / |W| over the sample, each weight rounded by the format that the plan gives it."""
        stored = [layer for layer in plan.layers if f"{layer.name}.weight" in self._checkpoint.headers]
        chosen = stored[:: max(1, len(stored) // _LAYERS)][:_LAYERS]
        sums = [self._squares(layer) for layer in chosen]
        total = sum(norm for _, norm in sums)
        return math.sqrt(sum(error for error, _ in sums) / total) if total else math.nan

    def _squares(self, layer: PlannedLayer) -> tuple[float, float]:
        weight, shape = self._weight(layer), layer.dense.shape
        try:
            shape = (min(_ROWS, shape[0]), shape[1])
            layer.weight_format.check_shape(shape)
        except ValueError:  # it stores blocks of more rows
            shape = layer.dense.shape
        rows = weight[: shape[0]]
        stored = layer.weight_format.quantize(rows)
        operands = layer.weight_format.operands(stored, shape)
        found = layer.weight_format.read(stored, shape).dequantize(operands, shape)
        return float((found.float() - rows.float()).square().sum()), float(rows.float().square().sum())

    def _weight(self, layer: PlannedLayer) -> Tensor:
        name = f"{layer.name}.weight"
        if name not in self._weights:
            _, weight = next(iter(self._checkpoint.stream([name])))
            self._weights[name] = weight if tuple(weight.shape) == layer.dense.shape else weight.t()  # of a Conv1D
        return self._weights[name]


def _text(fitting: list[Candidate]) -> str:
    cells = [
        (
            each.method,
            brief_settings(each.config),
            f"{each.bits_per_weight:.2f}",
            in_bytes(each.bytes),
            f"{100 * each.error:.2f} %",
            "calibrates" if each.calibrates else "",
        )
        for each in fitting
    ]
    return table(_COLUMNS, cells, right=_COLUMNS[2:5])
