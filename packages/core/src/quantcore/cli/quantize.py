"""`quantcore quantize`: a float checkpoint folder becomes a quantized one."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import quantcore
from quantcore.cli.config_flags import config_fields, config_options, given_values
from quantcore.cli.folders import check_target
from quantcore.cli.group import Verb, nearest, write_flags
from quantcore.cli.methods import chosen_backend, installed_methods
from quantcore.cli.output import Output, in_bytes, output_options, plural
from quantcore.cli.sizes import size_table
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from quantcore.cli.estimate import Sizes

EXAMPLES = (
    "quantcore quantize examples/stdlib-lm stdlib-lm-nf4 --method bitsandbytes --bnb-4bit-quant-type nf4",
    "quantcore quantize examples/stdlib-lm --method hqq --nbits 3 --group-size 64 --dry-run",
    "quantcore quantize --method hqq --help",
)
# Keys of click's ctx.meta: the content of --config, the method, the flags generated for it.
_FILE, _METHOD, _FLAGS = "quantcore.file", "quantcore.method", "quantcore.flags"

DTYPES = ("float32", "bfloat16", "float16")


class QuantizeVerb(Verb):
    """A verb with the flags of the method that stands on its command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_FILE] = config = _read_config_file(_argument_of(args, "--config"))
        method = _method(args, config)
        if method is not None:
            ctx.meta[_METHOD] = chosen_backend(method, "--method").method
            taken = {flag.lstrip("-") for parameter in self.params for flag in parameter.opts}
            fields = config_fields(plugins().resolve(method, "config"))
            ctx.meta[_FLAGS] = config_options(fields, taken, ctx.meta[_METHOD])
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_FLAGS, ())]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        generated = ctx.meta.get(_FLAGS, ())
        own = [parameter for parameter in self.get_params(ctx) if parameter not in generated]
        write_flags("Flags", own, ctx, formatter)
        if generated:
            write_flags(f"Flags of {ctx.meta[_METHOD]}", generated, ctx, formatter)
        else:
            with formatter.section("Flags of a method"):
                formatter.write_text(f"quantcore quantize --method NAME --help; installed: {installed_methods()}")


@click.command("quantize", cls=QuantizeVerb, examples=EXAMPLES)
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", required=False)
@click.option("--method", metavar="NAME", help="Method to quantize with; quantcore list shows them.")
@click.option("--config", metavar="FILE", help="JSON file with a quantization_config, instead of flags of the method.")
@click.option("--dry-run", is_flag=True, help="Print size, bits per weight and what stays float; read no weights.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Dtype to read the float weights in [default: that of the file]"
)
@click.option("--device", metavar="NAME", default="cpu", help="Where to quantize: cpu, cuda:0, auto [default: cpu]")
@click.option("--max-shard-size", metavar="SIZE", default="5GB", help="Largest file to write [default: 5GB]")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
@output_options(brief="only the folder that was made")
def command(source: str, target: str | None, dry_run: bool, output: Output, **options: Any) -> None:
    """Quantize the float model IN and write the result to the folder OUT.

    IN is a folder with config.json and safetensors files, or the id of such a model on the hub.
    """
    config = _config(click.get_current_context(), output)
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
    from quantcore.checkpoints.read import resolve
    from quantcore.checkpoints.write import parse_size
    from quantcore.cli.estimate import estimate, measure
    from quantcore.cli.progress import quantizing_bar

    parse_size(options["max_shard_size"])  # before the work, for it is needed after it
    directory = resolve(source)
    expected = estimate(directory, config, options["dtype"])
    model = quantcore.load(directory, device_map=options["device"], dtype=options["dtype"])
    output.note(f"quantizing {plural(expected.layers, 'layer')} with {_name(config)}")
    with quantizing_bar(expected.weights, output):
        quantcore.quantize(model, config)
    output.note(f"writing {target}")
    quantcore.save(
        model, target, max_shard_size=options["max_shard_size"], overwrite=options["force"], companions_from=directory
    )
    sizes, seconds = measure(model, target, expected), time.perf_counter() - start
    data = {"output": str(target), "method": _name(config), "seconds": seconds}
    output.result(data | sizes.to_dict(), lambda: f"{_summary(sizes)}\n\n{_made(target, sizes, seconds)}", str(target))


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


def _config(ctx: click.Context, output: Output) -> QuantizationConfigMixin:
    """The config that --method, --config and the method's flags ask for; whatever is wrong with it is a usage error."""
    method = ctx.meta.get(_METHOD)
    if method is None:
        raise click.UsageError(f"flag --method is missing; installed: {installed_methods()}")
    cls: type[QuantizationConfigMixin] = plugins().resolve(method, "config")
    given = given_values(ctx, ctx.params)
    fields = {field.name: field for field in config_fields(cls)}
    missing = [name for name, field in fields.items() if field.is_required and name not in {*given, *ctx.meta[_FILE]}]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise click.UsageError(f"method {method} needs {flags}; see quantcore quantize --method {method} --help")
    try:
        config = _from_file(cls, ctx.meta[_FILE], given) if ctx.meta[_FILE] else cls(**given)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    for key in config.extra_keys:
        output.note(f"warning: {cls.__name__} has no field {key!r}{nearest(key, fields)}; it is kept in config.json")
    return config


def _from_file(
    cls: type[QuantizationConfigMixin], content: Mapping[str, Any], given: Mapping[str, Any]
) -> QuantizationConfigMixin:
    found = cls.from_dict(content, return_unused_kwargs=True, **given)
    assert isinstance(found, tuple)
    config, unused = found
    if unused:
        raise ValueError(f"{', '.join(sorted(unused))} cannot be set beside --config; set it in the file")
    return config


def _argument_of(args: Sequence[str], flag: str) -> str | None:
    """The value of a flag on a command line that is not parsed yet."""
    for position, word in enumerate(args):
        if word == "--":
            return None
        if word == flag:
            return args[position + 1] if position + 1 < len(args) else None
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def _read_config_file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}", param_hint="--config") from error
    if isinstance(content, dict):
        content = content.get("quantization_config", content)
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} holds no JSON object", param_hint="--config")
    return content


def _method(args: Sequence[str], config: Mapping[str, Any]) -> Any:
    """The method that --method or the config file names; two different ones are a usage error."""
    flag, key = _argument_of(args, "--method"), config.get("quant_method")
    if flag is not None and key is not None and normalize_method(flag) != normalize_method(key):
        raise click.UsageError(f"--method is {flag}, but --config is for {key}; leave one out")
    return key if flag is None else flag


def _name(config: QuantizationConfigMixin) -> str:
    return normalize_method(config.quant_method)
