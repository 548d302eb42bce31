"""`quantcore convert`: a quantized checkpoint folder in the format of another method."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import quantcore
from quantcore.cli.completing import files, folders, installed
from quantcore.cli.folders import check_places, check_size
from quantcore.cli.method_verb import DTYPES, MethodVerb, chosen_config, read_config_file
from quantcore.cli.output import Output, in_bytes, output_options, plural
from quantcore.plugins.known import normalize_method

if TYPE_CHECKING:
    from quantcore.workflows.conversion import Conversion

EXAMPLES = (
    "quantcore convert stdlib-lm-hqq stdlib-lm-float --to-float",
    "quantcore convert stdlib-lm-hqq stdlib-lm-from-hqq --to bitsandbytes --load-in-4bit --allow-lossy",
    "quantcore convert --to hqq --help",
)
# What a config takes over from the one of IN unless a flag says otherwise, under each of its published names.
_CARRIED = (("bits", "nbits", "w_bit"), ("group_size", "q_group_size"), ("sym",), ("desc_act",))


class ConvertVerb(MethodVerb):
    method_flag, short_flag = "--to", "-t"


@click.command("convert", cls=ConvertVerb, examples=EXAMPLES)
@click.argument("source", metavar="IN", shell_complete=folders)
@click.argument("target", metavar="OUT", shell_complete=folders)
@click.option(
    "--to",
    "-t",
    "method",
    metavar="NAME",
    shell_complete=installed,
    help="Method to convert to; quantcore list shows them.",
)
@click.option("--to-float", is_flag=True, help="Write float weights instead.")
@click.option("--from-pickle", is_flag=True, help="Rewrite pickled files as safetensors, with torch's safe reader.")
@click.option(
    "--config",
    metavar="FILE",
    shell_complete=files,
    help="JSON file with a quantization_config, instead of flags of the method.",
)
@click.option("--allow-lossy", is_flag=True, help="Round layers anew that the format cannot hold exactly.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of float weights [default: that of config.json]")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Largest file to write [default: 5GB]")
@click.option("--force", "-f", is_flag=True, help="Replace OUT if it is there.")
@output_options(brief="only the folder that was made")
def command(source: str, target: str, output: Output, **options: Any) -> None:
    """Write the quantized checkpoint folder IN as OUT in the format of another method, with the same values.

    Bits and group size are those of IN unless a flag changes them. A layer that the format cannot hold exactly stops
    the conversion, unless --allow-lossy is given.
    """
    _check_choice(options)
    check_places([source], target, options["force"], takes_file=options["from_pickle"])
    check_size(options["max_shard_size"])
    writing = {"max_shard_size": options["max_shard_size"], "overwrite": options["force"]}
    if options["from_pickle"]:
        _rewrite(source, target, options["config"], writing, output)
    else:
        _convert(source, target, options, writing, output)


def _check_choice(options: Mapping[str, Any]) -> None:
    named = [flag for flag in ("to_float", "from_pickle") if options[flag]]
    named += ["to"] if options["method"] or (options["config"] and not options["from_pickle"]) else []
    if len(named) != 1:
        raise click.UsageError("give one of --to NAME, --to-float and --from-pickle")
    if named != ["to"] and options["allow_lossy"]:
        raise click.UsageError("--allow-lossy goes with --to alone: nothing is rounded otherwise")
    if named == ["from_pickle"] and options["dtype"]:
        raise click.UsageError("--dtype does not go with --from-pickle, which keeps every tensor as it is")


def _convert(source: str, target: str, options: Mapping[str, Any], writing: dict[str, Any], output: Output) -> None:
    from quantcore.checkpoints.read import quantization_dict, read_config, resolve

    start = time.perf_counter()
    directory = resolve(source)
    config = None
    if not options["to_float"]:
        found = quantization_dict(read_config(directory)) or {}
        config = chosen_config(click.get_current_context(), _carried(found))
    allowed = {"allow_lossy": options["allow_lossy"], "dtype": options["dtype"]}
    done = quantcore.convert(directory, target, config, **allowed, **writing)
    seconds = time.perf_counter() - start
    layers = {"exact": done.exact, "lossy": done.lossy, "inverted": done.inverted, "dropped": done.dropped}
    data = {"output": target, **layers, "seconds": seconds}
    method = "float" if config is None else normalize_method(config.quant_method)
    from quantcore.cli.model_card import Made, write_card
    from quantcore.workflows.evaluation import disk_bytes

    settings = {} if config is None else config.to_dict()
    sizes = disk_bytes(Path(target)), disk_bytes(directory)
    name = None if config is None else method
    count = len(done.lossy) - len(done.inverted)
    rounded = [f"{plural(count, 'layer')} rounded anew by the conversion"] if count else []
    write_card(Made(Path(target), source, name, settings, *sizes, notes=rounded), directory)
    output.result(data | {"method": method}, lambda: _summary(done, target, method, seconds), target)


def _carried(found: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config of another method, under every name that they have."""
    values = {names: next((found[name] for name in names if name in found), None) for names in _CARRIED}
    return {name: value for names, value in values.items() if value is not None for name in names}


def _summary(done: Conversion, target: str, method: str, seconds: float) -> str:
    lines = [] if done.config is None else [f"{plural(len(done.exact), 'layer')} converted with the same values"]
    if done.inverted:
        first = done.inverted[0]
        lines.append(
            f"{plural(len(done.inverted), 'layer')} converted with the same codes and scales of blocks, such as "
            f"{first}: {done.lossy[first]}"
        )
    kept = set(done.inverted)
    anew = {name: reason for name, reason in done.lossy.items() if name not in kept}
    if anew:
        first, reason = next(iter(anew.items()))
        lines.append(f"{plural(len(anew), 'layer')} rounded anew, such as {first}: {reason}")
    if done.dropped:
        tensors = plural(len(done.dropped), "scale")
        lines.append(
            f"{tensors} of keys and values left out, which this format has no use for, such as {done.dropped[0]}"
        )
    return "\n".join([*lines, _made(target, method, seconds)])


def _rewrite(source: str, target: str, config: str | None, writing: dict[str, Any], output: Output) -> None:
    from quantcore.checkpoints.pickled import rewrite_pickled

    start = time.perf_counter()
    rewrite_pickled(source, target, read_config_file(config) or None, **writing)
    seconds = time.perf_counter() - start
    output.result({"output": target, "seconds": seconds}, lambda: _made(target, "safetensors", seconds), target)


def _made(target: str, kind: str, seconds: float) -> str:
    from quantcore.workflows.evaluation import disk_bytes

    size = disk_bytes(Path(target))
    return f"made {target} ({kind}): {in_bytes(size)}, in {seconds:.1f} s; load it with quantcore.load({target!r})"
