"""Formats as strings, the form in which they pass through torch ops, and back without evaluating anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from quantcore.formats.base import WeightFormat

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
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("not of the form Name(field=literal, ...)")
        values = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        return _class(ast.unparse(call.func))(**values)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r:.120} is no weight format: {error}") from error


def _class(name: str) -> type[WeightFormat]:
    named = [
        cls for cls in _subclasses(WeightFormat) if name in (cls.__qualname__, f"{cls.__module__}.{cls.__qualname__}")
    ]
    if not named:
        raise ValueError(f"weight format {name!r} is unknown here; import the backend that defines it")
    if len(named) > 1:
        raise ValueError(f"{name!r} is the name of {len(named)} weight formats; put the module before it")
    return named[0]


def _subclasses(cls: type[WeightFormat]) -> Iterator[type[WeightFormat]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
