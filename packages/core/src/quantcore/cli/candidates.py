"""The configs that `quantcore recommend` weighs beside the examples: their neighbours in bits and group size."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from quantcore.cli.config_flags import WIDTHS, ConfigField, config_fields, config_options
from quantcore.plugins import Backend
from quantcore.plugins.manager import plugins

# Published names of the other setting by which sizes differ, and the values that are tried of both.
_SIZES = ("group_size", "q_group_size")
_TRIED = {**dict.fromkeys(WIDTHS, (8, 6, 4, 3, 2)), **dict.fromkeys(_SIZES, (128, 32))}
_WHOLE = ("weights", "type", "scheme", "quant_algo")  # settings that name a form as a whole
_NAMED = 24  # choices of such a setting at most: more are types of single tensors


def neighbours(backend: Backend) -> Iterator[dict[str, Any]]:
    """Configs beside a method's examples, some of which may be none: other bits, group sizes and forms."""
    base = dict(backend.default or backend.example_configs[0])
    fields = {field.name: field for field in config_fields(plugins().resolve(backend.method, "config"))}
    for name in _WHOLE:
        offered = _offered(fields[name]) if name in fields else []
        if len(offered) <= _NAMED:
            yield from ({**base, name: choice} for choice in offered)
    bits, sizes = (next((name for name in names if name in fields), None) for names in (WIDTHS, _SIZES))
    for width in _TRIED[bits] if bits else (None,):
        for size in _TRIED[sizes] if sizes else (None,):
            changed = {name: value for name, value in ((bits, width), (sizes, size)) if name is not None}
            if changed:
                yield {**base, **changed}


def command_line(
    source: str, method: str, config: Mapping[str, Any], data: str | None = None, suffix: str = "", server: str = ""
) -> str:
    """The line that quantizes a model so, as it can be pasted into a shell.

    data: what to calibrate on, None for a config that needs none. suffix: of the file to write, "" for a folder.
    server: what shall read it, "" for any program.
    """
    from quantcore.cli.quantize import command

    taken = {flag.lstrip("-") for parameter in command.params for flag in parameter.opts if len(flag) > 2}
    fields = config_fields(plugins().resolve(method, "config"))
    options = dict(zip((field.name for field in fields), config_options(fields, taken, method), strict=True))
    name = Path(source).name or Path(source).resolve().name
    words = ["quantcore", "quantize", source, f"{name}-{method}{suffix}"]
    rest = [*([] if data is None else ["--calibration", data]), *(["--serve-with", server] if server else [])]
    if not set(config) <= set(options):  # a setting that is no field has no flag
        content = shlex.quote(json.dumps({"quant_method": method, **config}))
        return f"echo {content} > {method}.json && {shlex.join([*words, '--config', f'{method}.json', *rest])}"
    flags = [word for name, value in config.items() for word in _as_words(options[name], value)]
    return shlex.join([*words, "--method", method, *flags, *rest])


def compare_line(source: str, quantizing: str) -> str:
    """The line that shows how good the model is that another line makes, with a picture; which text, where one is."""
    words = shlex.split(quantizing)
    made, own = words[words.index("quantize") + 2], Path(source, "eval.txt")
    text = str(own) if own.is_file() else "TEXT.txt"
    return shlex.join(["quantcore", "compare", source, made, "--text", text, "--html", "report.html"])


def usual_data(source: str) -> str:
    """What a command calibrates on where the user named nothing.

    A text that comes with the model as calibration.txt, else a customary set, or a file to put a text in.
    """
    own = Path(source, "calibration.txt")
    if own.is_file():
        return str(own)
    return "wikitext2" if importlib.util.find_spec("datasets") is not None else "TEXT.txt"


def _as_words(option: click.Option, value: Any) -> list[str]:
    if isinstance(value, bool) and option.secondary_opts:
        return [option.opts[0] if value else option.secondary_opts[0]]
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [option.opts[0], ",".join(map(str, value))]
    return [option.opts[0], value if isinstance(value, str) else json.dumps(value)]


def _offered(field: ConfigField) -> list[Any]:
    only_read = field.metadata.get("only_read") or ()
    return [choice for choice in field.metadata.get("choices") or () if choice is not None and choice not in only_read]
