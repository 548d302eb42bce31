"""Formats as strings and back: what passes through the op, in this process and in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from tiny_int8 import TinyInt8

from quantcore.formats.base import WeightFormat
from quantcore.formats.interning import format_from_key, format_key


@dataclass(frozen=True)
class Everything(WeightFormat):
    """A field of every kind that a format may have."""

    text: str = "a'\"\\\n"
    whole: int = -3
    real: float = 1e-30
    flag: bool = True
    nothing: str | None = None
    several: tuple[int, ...] = (1, (2,), ())  # type: ignore[assignment]


def define(name: str, module: str) -> type[WeightFormat]:
    """A format class of a given name and module, as two plugins might both define one."""
    cls = dataclass(frozen=True)(type(name, (WeightFormat,), {"__module__": module, "__qualname__": name}))
    assert issubclass(cls, WeightFormat)
    return cls


def test_key_gives_back_the_format() -> None:
    assert format_from_key(format_key(TinyInt8(multiple=3))) == TinyInt8(multiple=3)


def test_equal_formats_share_one_object() -> None:
    assert format_from_key(format_key(TinyInt8(multiple=7))) is format_from_key(format_key(TinyInt8(multiple=7)))


def test_key_that_was_never_interned_is_parsed() -> None:
    assert format_from_key("TinyInt8(names=('a', 'b'), multiple=11)") == TinyInt8(("a", "b"), 11)


def test_every_kind_of_field_survives() -> None:
    text = repr(Everything(whole=4))
    assert format_from_key(text) == Everything(whole=4)


def test_key_is_parsed_in_a_fresh_process(run_python: Callable[..., Any]) -> None:
    code = f"""
        import tiny_int8
        from quantcore.formats.interning import format_from_key
        print(format_from_key({format_key(TinyInt8(multiple=5))!r}).multiple)
    """
    assert run_python(code).stdout.strip() == "5"


def test_formats_of_one_name_in_two_modules_are_kept_apart() -> None:
    first, second = define("Twin", "plugin_one"), define("Twin", "plugin_two")
    keys = [format_key(first()), format_key(second())]
    assert [type(format_from_key(key)) for key in keys] == [first, second]


def test_name_of_two_formats_cannot_be_parsed_without_a_module() -> None:
    first, second = define("Double", "plugin_one"), define("Double", "plugin_two")
    with pytest.raises(ValueError, match="'Double' is the name of 2 weight formats"):
        format_from_key("Double()")
    assert type(format_from_key("plugin_two.Double()")) is second
    assert type(format_from_key("plugin_one.Double()")) is first


@pytest.mark.parametrize(
    "text",
    [
        "",
        "TinyInt8",
        "TinyInt8(",
        "TinyInt8(3)",
        "TinyInt8(*[3])",
        "TinyInt8(**{'multiple': 3})",
        "TinyInt8(multiple=__import__('os').getpid())",
        "TinyInt8(multiple=open('x'))",
        "TinyInt8(unknown=3)",
        "__import__('os')(name='x')",
        "exec(text='1')",
        "WeightFormat.__subclasses__()",
        "[TinyInt8()]",
        "TinyInt8(multiple=" + "-" * 5000 + "1)",
        "TinyInt8(multiple=" + "(" * 300 + ")" * 300 + ")",
        "TinyInt8(multiple=1)\0",
    ],
    ids=lambda text: f"{text:.24}",
)
def test_text_that_is_no_format_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="is no weight format"):
        format_from_key(text)


def test_unknown_format_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="'NoSuchFormat' is unknown here; import the backend that defines it"):
        format_from_key("NoSuchFormat(bits=4)")
