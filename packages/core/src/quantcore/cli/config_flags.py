"""Flags generated from a config class: one for each argument of its constructor."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from quantcore.quantization_config import QuantizationConfigMixin, type_hints

WIDTHS = ("bits", "nbits", "w_bit", "num_bits")  # published names of the bits of a code
_PREFIX = "config__"  # of the click names of generated flags, apart from a verb's own


@dataclass(frozen=True)
class ConfigField:
    """One argument of a config's constructor. default: inspect.Parameter.empty when there is none."""

    name: str
    annotation: Any
    default: Any
    metadata: Mapping[str, Any]
    help: str

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty


def config_fields(cls: type[QuantizationConfigMixin]) -> list[ConfigField]:
    """What a config class can be given, in the order of its constructor."""
    hints = _hints(cls)
    declared = {field.name: field for field in dataclasses.fields(cls)}
    extra_help: Mapping[str, str] = getattr(cls, "option_help", {})
    fields = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        field = declared.get(parameter.name)
        metadata = {} if field is None else field.metadata
        text = extra_help.get(parameter.name) or metadata.get("help") or ""
        default = parameter.default if field is None else _default(field, parameter.default)
        fields.append(ConfigField(parameter.name, hints.get(parameter.name, Any), default, metadata, text))
    return fields


def config_options(fields: Iterable[ConfigField], taken: Iterable[str], method: str) -> list[click.Option]:
    """A click option for each field; where the verb has a flag of that name, the method's name goes before it."""
    taken = set(taken)
    return [_option(field, f"{method.replace('_', '-')}-" if _kebab(field.name) in taken else "") for field in fields]


def given_values(ctx: click.Context, params: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the generated flags that the user gave."""
    return {
        name.removeprefix(_PREFIX): value
        for name, value in params.items()
        if name.startswith(_PREFIX) and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


class ConfigValue(click.ParamType):  # type: ignore[type-arg]
    """Text that becomes a value of an annotation built of classes, None, unions, list and dict."""

    def __init__(self, annotation: Any, is_dtype: bool = False) -> None:
        self.members = [str] if is_dtype else list(_members(annotation))
        self.is_optional = type(None) in self.members
        self.name = "dtype" if is_dtype else "|".join(dict.fromkeys(_metavar(member) for member in self.members))

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if self.is_optional and value.lower() == "none":
            return None
        for member in sorted(self.members, key=_order):
            try:
                return _parse(value, member)
            except ValueError:
                continue
        self.fail(f"{value!r} is not of the form {self.name.upper()}", param, ctx)


def _option(field: ConfigField, prefix: str) -> click.Option:
    name, flag = _PREFIX + field.name, prefix + _kebab(field.name)
    members = [member for member in _members(field.annotation) if member is not type(None)]
    choices = _made(field)
    is_offered = bool(choices) or not field.metadata.get("choices")
    options: dict[str, Any] = {"help": _help(field), "default": None, "hidden": not is_offered}
    if members == [bool]:
        return click.Option([name, f"--{flag}/--no-{flag}"], **options)
    if [typing.get_origin(member) or member for member in members] == [list]:
        options.update(multiple=True, callback=_joined)
    options["type"] = ConfigValue(field.annotation, bool(field.metadata.get("dtype")))
    if choices and field.annotation is str:
        options["type"] = click.Choice(choices)
    return click.Option([name, f"--{flag}"], **options)


def _joined(ctx: click.Context, param: click.Parameter, value: tuple[list[Any] | None, ...]) -> list[Any] | None:
    """The one list of a flag that was given several times, each time with one or more items."""
    return None if None in value else [item for items in value for item in items or ()]


def _help(field: ConfigField) -> str:
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    choices = _made(field) if field.annotation is not str else None  # else the flag itself shows them
    notes = [f"one of {', '.join(map(str, choices))}"] if choices else []
    if low is not None or high is not None:
        notes.append(f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}")
    if field.is_required:
        notes.append("required")
    elif field.default not in (None, "", [], {}):
        notes.append(f"default: {_spell(field.default)}")
    text = field.help[:1].upper() + field.help[1:]
    return f"{text} [{'; '.join(notes)}]".strip() if notes else text


def _made(field: ConfigField) -> list[Any]:
    """The values of a field that a model can be quantized to, where they are few."""
    only_read = field.metadata.get("only_read") or ()
    return [choice for choice in field.metadata.get("choices") or () if choice not in only_read]


def _hints(cls: type[QuantizationConfigMixin]) -> dict[str, Any]:
    """Annotations of the constructor and of the fields; a field's own goes first."""
    found: dict[str, Any] = {}
    for target in (cls.__init__, cls):
        try:
            found.update(type_hints(target))
        except NameError:  # an annotation that only a type checker can resolve: its flag takes any JSON
            continue
    return {name: hint.type if isinstance(hint, dataclasses.InitVar) else hint for name, hint in found.items()}


def _default(field: dataclasses.Field[Any], default: Any) -> Any:
    return default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _metavar(member: Any) -> str:
    origin = typing.get_origin(member) or member
    if origin is list:
        inner = "|".join(_metavar(item) for item in typing.get_args(member)) or "text"
        return f"{inner}[,{inner}]"
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "|".join(str(item.value) for item in member)
    names = {int: "int", float: "float", bool: "true|false", str: "text", type(None): "none"}
    return names.get(origin, "json")


def _order(member: Any) -> int:
    """Narrow types are tried first: "4" is an int before it is a float, and text is the last resort."""
    order = (bool, int, float, dict, list, Any, str)
    origin = typing.get_origin(member) or member
    return order.index(origin) if origin in order else 3


def _parse(text: str, member: Any) -> Any:
    """Text as a value of one type. Raises ValueError when it is none."""
    origin = typing.get_origin(member) or member
    if origin is type(None):
        raise ValueError("only the word none")
    if origin is bool:
        return _parse_bool(text)
    if origin in (int, float, str):
        return origin(text)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return origin(text)
    if origin is list:
        inner = ConfigValue(*(typing.get_args(member) or (str,)))
        return [inner.convert(item.strip(), None, None) for item in text.split(",") if item.strip()]
    return _parse_json(text, origin)


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("neither true nor false")
    return text.lower() == "true"


def _parse_json(text: str, origin: Any) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if origin is Any:
            return text
        raise
    if origin is not Any and isinstance(origin, type) and not isinstance(value, origin):
        raise ValueError(f"a JSON value of type {type(value).__name__}")
    return value


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(getattr(value, "value", value))


def _kebab(name: str) -> str:
    return name.strip("_").replace("_", "-")
