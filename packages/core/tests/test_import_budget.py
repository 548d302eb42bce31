"""Importing costs next to nothing: no torch, no plugin, few modules."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

FORBIDDEN = "torch", "numpy", "pluggy", "triton", "transformers", "accelerate", "safetensors", "sympy", "typing"

# Python starts with little; what a statement imports costs the same on every machine, unlike the time that it takes.
OURS = """
import sys
{statement}
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "quantcore"))
"""
DISCOVER = "from quantcore.plugins.discovery import methods\nfound = methods()"


def own_modules(run_python: Callable[..., Any], statement: str, **options: Any) -> set[str]:
    return set(run_python(OURS.format(statement=statement), **options).stdout.split())


def imported(run_python: Callable[..., Any], statement: str, modules: tuple[str, ...], **options: Any) -> str:
    code = f"import sys\n{statement}\nprint(*sorted(set(sys.modules) & {set(modules)!r}))"
    return str(run_python(code, **options).stdout).strip()


def test_import_loads_the_names_alone(run_python: Callable[..., Any]) -> None:
    assert own_modules(run_python, "import quantcore") == {"quantcore", "quantcore._lazy"}


def test_discovery_loads_few_modules(run_python: Callable[..., Any]) -> None:
    assert len(own_modules(run_python, DISCOVER)) <= 10


def test_discovery_among_many_installed_methods_loads_none_of_them(
    site: Any, plugin: Callable[..., str], child_environment: dict[str, str], run_python: Callable[..., Any]
) -> None:
    for number in range(20):
        site.install(
            f"made-up-{number}", {f"rows{number}": f"rows{number}"}, {f"rows{number}": plugin(f"rows{number}")}
        )
    paths = os.pathsep.join((child_environment["PYTHONPATH"], str(site.folder)))
    statement = f"{DISCOVER}\nassert sum(info.installed for info in found) >= 20"
    many = {"env": {"PYTHONPATH": paths}}
    assert own_modules(run_python, statement, **many) == own_modules(run_python, DISCOVER)
    assert imported(run_python, statement, tuple(f"rows{number}" for number in range(20)), **many) == ""


def test_import_loads_no_heavy_package(run_python: Callable[..., Any]) -> None:
    assert imported(run_python, "import quantcore", FORBIDDEN) == ""


def test_methods_loads_neither_torch_nor_pluggy(run_python: Callable[..., Any]) -> None:
    assert imported(run_python, "import quantcore; quantcore.methods()", ("torch", "numpy", "pluggy", "triton")) == ""


def test_plugin_interface_loads_neither_torch_nor_triton(run_python: Callable[..., Any]) -> None:
    statement = "from quantcore.plugins import Backend, hookimpl"
    assert imported(run_python, statement, ("torch", "triton", "transformers")) == ""


def test_config_module_loads_no_torch(run_python: Callable[..., Any]) -> None:
    assert imported(run_python, "import quantcore.utils.quantization_config", ("torch",)) == ""


def test_inner_modules_load_no_compiler(run_python: Callable[..., Any]) -> None:
    compiler = "torch._dynamo", "sympy", "triton", "transformers", "torch.distributed.tensor"
    statement = "import quantcore.nn, quantcore.kernels.ops, quantcore.workflows.model"
    torch_alone = imported(run_python, "import torch", compiler)
    assert imported(run_python, statement, compiler) == torch_alone


def test_import_prints_nothing(run_python: Callable[..., Any]) -> None:
    done = run_python("import quantcore, quantcore.nn, quantcore.workflows.model")
    assert (done.stdout, done.stderr) == ("", "")


def test_every_public_name_resolves(run_python: Callable[..., Any]) -> None:
    done = run_python("import quantcore; print(*[name for name in dir(quantcore) if getattr(quantcore, name) is None])")
    assert done.stdout.strip() == ""


def test_unknown_attribute_is_an_attribute_error(run_python: Callable[..., Any]) -> None:
    done = run_python("import quantcore; print(hasattr(quantcore, 'quantise'))")
    assert done.stdout.strip() == "False"


def test_version_is_that_of_the_distribution(run_python: Callable[..., Any]) -> None:
    assert run_python("import quantcore; print(quantcore.__version__)").stdout.strip()[0].isdigit()
