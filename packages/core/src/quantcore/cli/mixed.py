"""The flags `--bits-budget` and `--target-size`: settings of single layers, chosen within a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantcore.cli.methods import installed_methods
from quantcore.cli.output import Output, table
from quantcore.cli.progress import progress_bar
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from torch import nn

    from quantcore.quantization_config import QuantizationConfigMixin
    from quantcore.workflows.mixed import Mixture
    from quantcore.workflows.quantize import FloatModel
    from quantcore.workflows.sensitivity import Curvature

Function = TypeVar("Function", bound=Callable[..., Any])

_ROWS, _SEQLEN = 16, 128  # of the text, where --samples and --seqlen say nothing else
_BAR = 24  # characters of the longest bar


def budget_options(function: Function) -> Function:
    """Decorator: the flags; `is_budgeted` and `mixture_for` read them."""
    options = (
        click.option(
            "--bits-budget",
            metavar="BITS",
            type=click.FloatRange(min=0, min_open=True),
            help="Choose the bits of each layer by what they cost in accuracy: so many a weight on average.",
        ),
        click.option("--target-size", metavar="SIZE", help="The same for the size of the file, such as 5GB."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def is_budgeted(options: Mapping[str, Any]) -> bool:
    """Whether the user gave a budget; click.UsageError for two."""
    given = [name for name in ("bits_budget", "target_size") if options[name] is not None]
    if len(given) == 2:
        raise click.UsageError("--bits-budget and --target-size are two budgets; give one")
    return bool(given)


def mixture_for(
    source: str | Path, config: QuantizationConfigMixin, options: Mapping[str, Any], output: Output
) -> Mixture:
    """The config with settings of its own for each layer, within the budget that the flags give.

    Errors are weighed by what they do to the model's predictions, for the text of --calibration or one that the model
    writes itself.
    """
    from quantcore.workflows.mixed import mixed_config
    from quantcore.workflows.quantize import open_float

    method = normalize_method(config.quant_method)
    per_layer = plugins().backend(method).per_layer
    if per_layer is None:
        raise click.UsageError(
            f"{method} has no settings for single layers that a budget could choose; methods that have are "
            f"{_able() or 'none of those installed'}"
        )
    opened = open_float(source, dtype=options["dtype"])
    budget = _bytes(opened, config, options)
    curvature = _curvature(opened, Path(source), options, output)
    with progress_bar(output) as update:
        return mixed_config(
            opened, config, per_layer, budget, curvature, lambda done, total, name: update(done, total, name)
        )


def without_weighing(config: QuantizationConfigMixin, options: Mapping[str, Any]) -> dict[str, Any]:
    """The flags without a text and its rows, where they weigh errors alone and the method itself takes no data."""
    from quantcore.quantizers.auto import AutoHfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    takes_data = isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data
    return {**options} if takes_data else {**options, **dict.fromkeys(("calibration", "samples", "seqlen"))}


def mixture_text(mixture: Mixture) -> str:
    """A picture of what was chosen: how many layers of each kind have which setting, the share as a bar."""
    from quantcore.workflows.sample import kind_of

    counts = Counter((kind_of(name), words) for name, words in mixture.settings.items())
    totals = Counter(kind_of(name) for name in mixture.settings)
    rows = [
        (kind, words, str(count), "#" * max(1, round(_BAR * count / totals[kind])))
        for (kind, words), count in sorted(counts.items())
    ]
    return table(("layer", "setting", "layers", "share of its kind"), rows, right=("layers",))


def _able() -> str:
    names = installed_methods().split(", ")
    return ", ".join(name for name in names if plugins().backend(name).per_layer is not None)


def _bytes(opened: FloatModel, config: QuantizationConfigMixin, options: Mapping[str, Any]) -> int:
    """What the quantized layers may take."""
    from quantcore.checkpoints.write import parse_size
    from quantcore.cli.estimate import file_bytes_of, sizes_of
    from quantcore.workflows.quantize import float_quantizer

    planned = opened.planned(float_quantizer(config))
    sizes = sizes_of(planned)
    if options["bits_budget"] is not None:
        return int(options["bits_budget"] * sizes.weights / 8)
    try:
        target = parse_size(options["target_size"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--target-size") from error
    return target - (file_bytes_of(planned, sizes, calibrates=False) - sizes.quantized_bytes)


def _curvature(opened: FloatModel, directory: Path, options: Mapping[str, Any], output: Output) -> dict[str, Curvature]:
    """By layer, from the text that was given, else from one that the model writes itself; none where it writes none."""
    from quantcore.cli.diagnosis import free_memory
    from quantcore.workflows.model import load
    from quantcore.workflows.sensitivity import record_curvature

    has_text, free = options["calibration"] is not None, free_memory()
    size = sum(header.nbytes for header in opened.checkpoint.headers.values())
    if not has_text and free is not None and size > free / 2:
        return _unweighed(f"the float model, of {size / 1e9:.1f} GB, leaves too little of the free memory", output)
    output.note("measuring how sensitive the model is to each layer")
    model = load(directory, dtype=options["dtype"]).eval()
    linear = _linear_names(opened)
    names = [name for name, _ in model.named_modules() if name in linear]
    if has_text:
        return record_curvature(model, names, _given_text(model, directory, options))
    try:
        return record_curvature(model, names, _own_text(model))
    except ValueError as error:
        return _unweighed(str(error), output)


def _given_text(model: nn.Module, directory: Path, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    from quantcore.calibration.data import Calibration, model_inputs
    from quantcore.cli.calibration import check_data
    from quantcore.integrations.transformers import load_tokenizer

    data = Calibration(
        check_data(options["calibration"]),
        tokenizer=load_tokenizer(directory),
        samples=options["samples"] or _ROWS,
        seqlen=options["seqlen"] or _SEQLEN,
        batch_size=1,
    )
    return model_inputs(data, model)


def _own_text(model: nn.Module) -> list[dict[str, Any]]:
    from quantcore.workflows.generation import written_rows

    return [{"input_ids": row} for row in written_rows(model, _ROWS, _SEQLEN).split(1)]


def _unweighed(reason: str, output: Output) -> dict[str, Curvature]:
    output.note(f"no --calibration, and {reason}: layers count by how far their weights move, which is worse")
    return {}


def _linear_names(opened: FloatModel) -> set[str]:
    from quantcore.nn.dense import view_dense

    return {name for name, module in opened.skeleton.named_modules() if view_dense(module) is not None}
