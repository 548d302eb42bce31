"""Flags that are made from a config class."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, ClassVar, Literal

import click
import pytest

import quantcore
from quantcore.cli.config_flags import ConfigValue, config_fields, config_options, given_values


class Width(enum.Enum):
    NARROW = "narrow"
    WIDE = "wide"


@dataclasses.dataclass(eq=False, repr=False)
class EveryKind(quantcore.QuantizationConfigMixin):
    """A config with a field of each kind that a flag is made for."""

    quant_method: ClassVar[str] = "every-kind"
    option_help: ClassVar[dict[str, str]] = {"plain": "from the table"}

    group_size: int | None = quantcore.option(128, minimum=-1, help="weights that share a scale")
    damp: float = quantcore.option(0.1, minimum=0.0, maximum=1.0)
    bits: int | float = quantcore.option(4, choices=(4, 1.58))
    symmetric: bool = True
    kind: str = quantcore.option("nf4", choices=("nf4", "fp4"))
    skip: list[str] | None = None
    sizes: list[int] = quantcore.option(default_factory=lambda: [1, 2])
    nested: dict[str, Any] | None = None
    storage: Any = quantcore.option(None, dtype=True)
    width: Width = Width.NARROW
    plain: str = ""
    method: str = ""
    anything: Any = None


def parsed(*args: str) -> dict[str, Any]:
    """Values that the generated flags of EveryKind take from a command line."""
    options = config_options(config_fields(EveryKind), taken={"method"}, method="every_kind")
    context = click.Command("x", params=list(options)).make_context("x", list(args))
    return given_values(context, context.params)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--group-size", "64"], {"group_size": 64}),
        (["--group-size", "-1"], {"group_size": -1}),
        (["--damp", "1e-3"], {"damp": 0.001}),
        (["--bits", "4"], {"bits": 4}),
        (["--bits", "1.58"], {"bits": 1.58}),
        (["--symmetric"], {"symmetric": True}),
        (["--no-symmetric"], {"symmetric": False}),
        (["--kind", "fp4"], {"kind": "fp4"}),
        (["--skip", "a,b", "--skip", "c"], {"skip": ["a", "b", "c"]}),
        (["--sizes", "3, 4"], {"sizes": [3, 4]}),
        (["--nested", '{"a": [1, null]}'], {"nested": {"a": [1, None]}}),
        (["--storage", "bfloat16"], {"storage": "bfloat16"}),
        (["--width", "wide"], {"width": Width.WIDE}),
        (["--anything", "[1]"], {"anything": [1]}),
        (["--anything", "word"], {"anything": "word"}),
        (["--every-kind-method", "x"], {"method": "x"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_gives_a_value_of_its_fields_type(args: list[str], expected: dict[str, Any]) -> None:
    found = parsed(*args)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]


def test_the_word_none_gives_none_where_a_field_allows_it() -> None:
    assert ConfigValue(int | None).convert("none", None, None) is None


@pytest.mark.parametrize(
    "args",
    [["--group-size", "many"], ["--kind", "int4"], ["--sizes", "1,x"], ["--nested", "[1]"], ["--width", "huge"]],
    ids=" ".join,
)
def test_a_value_of_another_type_is_a_usage_error(args: list[str]) -> None:
    with pytest.raises(click.BadParameter, match=args[1].partition(",")[2] or args[1].strip("[]")):
        parsed(*args)


def test_help_of_a_flag_tells_limits_and_default() -> None:
    texts = {option.name: option.help for option in config_options(config_fields(EveryKind), (), "every-kind")}
    assert texts["config__group_size"] == "Weights that share a scale [at least -1; default: 128]"
    assert texts["config__damp"] == "[0.0 to 1.0; default: 0.1]"
    assert texts["config__bits"] == "[one of 4, 1.58; default: 4]"
    assert texts["config__symmetric"] == "[default: yes]"
    assert texts["config__sizes"] == "[default: 1,2]"
    assert texts["config__plain"] == "From the table"
    assert texts["config__width"] == "[default: narrow]"


LITERAL = Literal["a"]  # an annotation of another kind than the flags know


def test_an_annotation_that_flags_do_not_know_takes_json() -> None:
    assert ConfigValue(LITERAL).convert('"a"', None, None) == "a"


@dataclasses.dataclass(eq=False, repr=False)
class WithPreset(quantcore.QuantizationConfigMixin):
    """A config whose constructor takes what is no field."""

    quant_method: ClassVar[str] = "with-preset"

    preset: dataclasses.InitVar[str | None] = None

    def __post_init__(self, preset: str | None) -> None:
        super().__post_init__()


def test_argument_that_is_no_field_gets_a_flag_of_its_own_kind() -> None:
    (field,) = config_fields(WithPreset)
    assert ConfigValue(field.annotation).name == "text|none"
