"""Verbs whose flags depend on a method: those of its config stand beside the verb's own."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from quantcore.cli.completing import installed
from quantcore.cli.config_flags import WIDTHS, config_fields, config_options, given_values
from quantcore.cli.group import Verb, long_flags, nearest, write_examples, write_flags
from quantcore.cli.methods import chosen_backend, installed_methods
from quantcore.errors import QuantcoreError
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin

logger = logging.getLogger(__name__)

_BUNDLED = "examples/stdlib-lm"  # the model that examples quantize
_FORMS = 4  # of a method's examples that a message shows
DTYPES = ("float32", "bfloat16", "float16")  # of float weights

# Keys of click's ctx.meta: the content of --config, the method, the flags generated for it.
_FILE, _METHOD, _FLAGS = "quantcore.file", "quantcore.method", "quantcore.flags"


method_option = click.option(
    "--method",
    "-m",
    metavar="NAME",
    shell_complete=installed,
    help="Method to quantize with; quantcore list shows them.",
)


class MethodVerb(Verb):
    """A verb with the flags of the method that stands on its command line after method_flag."""

    method_flag, short_flag = "--method", "-m"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            args = self._with_method(ctx, args)
        except (click.UsageError, QuantcoreError):
            if not ctx.resilient_parsing:  # a shell completes a line that is not whole yet
                raise
        return super().parse_args(ctx, args)

    def _with_method(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The command line with the method's flag in its long form; the flags of that method are known from here on."""
        ctx.meta[_FILE] = config = read_config_file(_argument_of(args, "--config"))
        args = [f"{self.method_flag}={word[2:]}" if _is_glued(word, self.short_flag) else word for word in args]
        args = [self.method_flag if word == self.short_flag else word for word in args]
        method = _method(args, self.method_flag, config)
        if method is not None:
            hint = "--config" if _argument_of(args, self.method_flag) is None else self.method_flag
            ctx.meta[_METHOD] = chosen_backend(method, hint).method
            taken = {flag.lstrip("-") for parameter in self.params for flag in parameter.opts if len(flag) > 2}
            fields = config_fields(plugins().resolve(method, "config"))
            ctx.meta[_FLAGS] = config_options(fields, taken, ctx.meta[_METHOD])
        return args

    def flags_beside(self, ctx: click.Context, flag: str) -> str:
        """With the method's own flags apart, and its settings where somebody asks for bits that it has no flag for."""
        generated = ctx.meta.get(_FLAGS, ())
        if not generated:
            return super().flags_beside(ctx, flag)
        method, own = ctx.meta[_METHOD], long_flags(option for option in generated if not option.hidden)
        others = [each for each in long_flags(self.get_params(ctx)) if each not in long_flags(generated)]
        widths = [_flag_of(name) for name in WIDTHS]
        if flag in widths:
            found = next((each for each in widths if each in own), None)
            hint = _settings_of(method, own) if found is None else f"; did you mean {found}?"
        else:
            hint = nearest(flag, [*own, *others])
        return f"{hint}\nFlags of {method}: {', '.join(own)}\nFlags: {', '.join(others)}"

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *ctx.meta.get(_FLAGS, ())]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        generated = ctx.meta.get(_FLAGS, ())
        own = [parameter for parameter in self.get_params(ctx) if parameter not in generated]
        write_flags("Flags", own, ctx, formatter)
        if generated:
            write_flags(f"Flags of {ctx.meta[_METHOD]}", generated, ctx, formatter)
            default = plugins().backend(ctx.meta[_METHOD]).default
            if default:
                with formatter.section("Without any of these"):
                    formatter.write_text(" ".join(_as_flags(default)))
        else:
            with formatter.section("Flags of a method"):
                formatter.write_text(
                    f"quantcore {self.name} {self.method_flag} NAME --help; installed: {installed_methods()}"
                )

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        method = ctx.meta.get(_METHOD) if self.name == "quantize" else None
        write_examples(self.examples if method is None else _examples_of(method), formatter)


def _examples_of(method: str) -> list[str]:
    """Lines that quantize the bundled model with the method's first configs."""
    from quantcore.cli.candidates import command_line

    backend = plugins().backend(method)
    data = f"{_BUNDLED}/calibration.txt" if backend.needs_calibration else None
    configs = [backend.default or backend.example_configs[0], *backend.example_configs[1:2]]
    return [command_line(_BUNDLED, method, config, data, backend.guide.file_suffix) for config in configs]


def _settings_of(method: str, flags: Collection[str]) -> str:
    """What a method that has no flag for bits has instead: its examples that differ in their first setting."""
    forms: dict[str, str] = {}
    for config in plugins().backend(method).example_configs:
        known = {name: value for name, value in config.items() if _flag_of(name) in flags}
        # What a nested setting holds would fill the screen.
        words = _as_flags({name: True if isinstance(value, Mapping) else value for name, value in known.items()})
        if words:
            forms.setdefault(words[0], " ".join(words))
    if not forms:
        return f"; {method} has one width, which takes no flag"
    return f"; {method} has no setting of bits, but {', or '.join([*forms.values()][:_FORMS])}"


def chosen_config(ctx: click.Context, defaults: Mapping[str, Any] | None = None) -> QuantizationConfigMixin:
    """The config that the command line asks for; whatever is wrong with it is a usage error.

    defaults: arguments that neither a flag nor --config gives; names that the config does not have are left out.
    """
    method = ctx.meta.get(_METHOD)
    if method is None:
        raise click.UsageError(f"flag {_flag(ctx)} is missing; installed: {installed_methods()}")
    cls: type[QuantizationConfigMixin] = plugins().resolve(method, "config")
    given = given_values(ctx, ctx.params)
    fields = {field.name: field for field in config_fields(cls)}
    usual = {name: value for name, value in (defaults or {}).items() if name in fields}
    if not ctx.meta[_FILE]:
        default = plugins().backend(method).default
        needed = {name: value for name, value in default.items() if name in fields and fields[name].is_required}
        usual = {**(needed if given else default), **usual}
    named = {*usual, *given, *ctx.meta[_FILE]}
    missing = [name for name, field in fields.items() if field.is_required and name not in named]
    if missing:
        flags = ", ".join(map(_flag_of, missing))
        raise click.UsageError(
            f"method {method} needs {flags}; see quantcore {ctx.info_name} {_flag(ctx)} {method} --help"
        )
    try:
        own = {"quant_method": method}  # one class may serve several methods, and mean other defaults by each
        file = ctx.meta[_FILE]
        config = _from_file(cls, {**file, **own}, given) if file else cls.from_dict({**own, **usual, **given})
        assert isinstance(config, QuantizationConfigMixin)
        config.check_quantizes()
    except (TypeError, ValueError) as error:
        raise click.UsageError(_in_flags(str(error), cls, () if ctx.meta[_FILE] else fields)) from error
    for name, (other, value) in config.without_effect(given).items():
        logger.warning("%s changes nothing without %s", *_as_flags({name: True, other: value}))
    return config


def _in_flags(text: str, cls: type, fields: Collection[str]) -> str:
    """An error of a config with the fields named as flags: those that it names by class, or that are no plain word."""
    plain = re.sub(rf"\b{cls.__name__}\.(?:\w+\.)*(\w+)", lambda found: _spelled(found, fields), text)
    words = "|".join(name for name in fields if "_" in name)
    return (
        re.sub(rf"(?<![-\w.'\"])({words})(?![\w'\"=:])", lambda found: _spelled(found, fields), plain)
        if words
        else plain
    )


def _spelled(found: re.Match[str], fields: Collection[str]) -> str:
    return _flag_of(found[1]) if found[1] in fields else found[0]


def _flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line gives them."""
    return [_flag_of(name) if value is True else f"{_flag_of(name)} {_word(value)}" for name, value in settings.items()]


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def _from_file(
    cls: type[QuantizationConfigMixin], content: Mapping[str, Any], given: Mapping[str, Any]
) -> QuantizationConfigMixin:
    found = cls.from_dict(content, return_unused_kwargs=True, **given)
    assert isinstance(found, tuple)
    config, unused = found
    if unused:
        flags = ", ".join(map(_flag_of, sorted(unused)))
        raise ValueError(f"{flags} cannot be set beside --config; set it in the file")
    return config


def _is_glued(word: str, short: str) -> bool:
    """Whether a word is a short flag with its value, as in -mhqq."""
    return word.startswith(short) and len(word) > 2


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


def read_config_file(path: str | None) -> dict[str, Any]:
    """The quantization_config of a JSON file, {} for None; a file that holds none is a usage error."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"cannot read {path}: {error.strerror}", param_hint="--config") from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is not JSON: {error}", param_hint="--config") from error
    if isinstance(content, dict):
        content = content.get("quantization_config", content)
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} holds no JSON object", param_hint="--config")
    return content


def _method(args: Sequence[str], method_flag: str, config: Mapping[str, Any]) -> Any:
    """The method that the flag or the config file names; two different ones are a usage error."""
    flag, key = _argument_of(args, method_flag), config.get("quant_method")
    if flag is not None and key is not None and normalize_method(flag) != normalize_method(key):
        raise click.UsageError(f"{method_flag} is {flag}, but --config is for {key}; leave one out")
    return key if flag is None else flag


def _flag(ctx: click.Context) -> str:
    assert isinstance(ctx.command, MethodVerb)
    return ctx.command.method_flag
