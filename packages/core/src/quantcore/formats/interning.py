"""Formats as strings, the form in which they pass through torch ops, and back without evaluating anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from quantcore.formats.base import Description, WeightFormat

_interned: dict[str, WeightFormat] = {}  # a cache: repr -> format; a model has few distinct formats


def format_key(weight_format: WeightFormat) -> str:
    """The repr of a format, remembered so that `format_from_key` is a dict look-up.

    Where two plugins chose one class name, the one that comes second gets its module before the name.
    """
    key = repr(weight_format)
    if type(_interned.setdefault(key, weight_format)) is not type(weight_format):
        key = f"{type(weight_format).__module__}.{key}"
        _interned.setdefault(key, weight_format)
    return key


def format_from_key(key: str) -> WeightFormat:
    """The format of a repr. Only literals are read; the class must be an imported WeightFormat.

    Raises ValueError when the text is no repr of a known format.
    """
    weight_format = _interned.get(key)
    if weight_format is None:
        weight_format = _interned[key] = _parse(key)
    return weight_format


def _parse(text: str) -> WeightFormat:
    try:
        weight_format: WeightFormat = _build(ast.parse(text, mode="eval").body, WeightFormat)
        return weight_format
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r:.120} is no weight format: {error}") from error


def _build(call: ast.expr, base: type[Any]) -> Any:
    """A subclass of base from the syntax of its repr."""
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("not of the form Name(field=literal, ...)")
    values = {str(word.arg): _value(word.value) for word in call.keywords}
    return _class(ast.unparse(call.func), base)(**values)


def _value(node: ast.expr) -> Any:
    """A field: a literal, a Description, a weight format, or a tuple of those."""
    if isinstance(node, ast.Call):
        is_format = bool(_named(ast.unparse(node.func), WeightFormat))
        return _build(node, WeightFormat if is_format else Description)
    return tuple(_value(each) for each in node.elts) if isinstance(node, ast.Tuple) else ast.literal_eval(node)


def _class(name: str, base: type[Any]) -> type[Any]:
    kind = "weight format" if base is WeightFormat else "description"
    named = _named(name, base)
    if not named:
        raise ValueError(f"{kind} {name!r} is unknown here; import the backend that defines it")
    if len(named) > 1:
        raise ValueError(f"{name!r} is the name of {len(named)} {kind}s; put the module before it")
    return named[0]


def _named(name: str, base: type[Any]) -> list[type[Any]]:
    known = dict.fromkeys(_subclasses(base))  # a class that has two bases is found by way of both
    return [cls for cls in known if name in (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")]


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
