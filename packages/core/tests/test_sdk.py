"""The one module for authors of backends: its table, what type checkers see of it, and what importing it costs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantcore import sdk

TARGETS = {name: target for section in sdk.SECTIONS.values() for name, target in section.items()}


def for_type_checkers() -> Iterator[tuple[str, str]]:
    """Name and place of each import under TYPE_CHECKING, as "module" or "module:name there"."""
    tree = ast.parse(Path(sdk.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname is not None, f"{alias.name}: a checker takes it for no public name without `as`"
            yield alias.asname, f"{node.module}:{alias.name}"


def places(name: str, target: str) -> set[str]:
    """The forms in which an import may name what a target of the table names."""
    module, _, attribute = target.partition(":")
    parent, _, last = module.rpartition(".")
    return {f"{module}:{attribute or name}"} | ({f"{parent}:{name}"} if last == name and not attribute else set())


def test_no_name_stands_in_two_sections() -> None:
    assert len(TARGETS) == sum(len(section) for section in sdk.SECTIONS.values())


def test_type_checkers_see_the_names_of_the_table() -> None:
    assert sorted(name for name, _ in for_type_checkers()) == sorted(TARGETS)


@pytest.mark.parametrize(("name", "place"), list(for_type_checkers()))
def test_type_checkers_see_each_name_where_the_table_finds_it(name: str, place: str) -> None:
    assert place in places(name, TARGETS[name])


@pytest.mark.parametrize("name", TARGETS)
def test_name_resolves(name: str) -> None:
    assert getattr(sdk, name) is not None
    assert name in dir(sdk)


def test_unknown_name_is_an_import_error_that_names_it(run_python: Callable[..., Any]) -> None:
    done = run_python("try: from quantcore.sdk import Backends\nexcept ImportError as error: print(error)")
    assert "Backends" in done.stdout


def test_entry_module_gets_what_it_needs_without_torch(run_python: Callable[..., Any]) -> None:
    code = "import sys\nfrom quantcore.sdk import Backend, hookimpl\n"
    code += "print(*{'torch', 'numpy', 'triton', 'transformers'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == ""


def test_config_gets_what_it_needs_without_torch(run_python: Callable[..., Any]) -> None:
    code = "import sys\nfrom quantcore.sdk import QuantizationConfigMixin, QuantizationMethod, check_limits, option\n"
    code += "print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
