"""The core is a house of floors: a module imports what stands below it, never what stands above.

Lazy imports and those for type checkers alone count too: what a reader must know to read a module lies below it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantcore

ROOT = Path(quantcore.__file__).parent

# From the ground up; what stands on one floor may import each other. Modules that are in no folder are ground floor.
FLOORS = (
    ("", "utils"),
    ("formats",),
    ("plugins",),
    ("kernels",),
    ("nn",),
    ("distributed",),
    ("checkpoints",),
    ("calibration",),
    ("quantizers",),
    ("integrations", "evaluation"),
    ("workflows",),
    ("testing",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Doors: they name what lies behind them, and nothing behind them goes through them.
FRONTS = {"quantcore", "quantcore.sdk", "quantcore.utils.quantization_config"}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("quantcore", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Each module of the core that a module imports, wherever the statement stands, with its line."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                part = f"{node.module}.{alias.name}"
                yield part if part in MODULES else str(node.module), node.lineno


def room(module: str) -> str:
    """The folder that a module stands in, empty for the ground floor."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (ROOT / parts[-1]).is_dir() else ""


def goes_up(module: str, target: str) -> bool:
    floor = LEVEL["workflows"] + 1 if target in FRONTS else LEVEL[room(target)]
    return floor > LEVEL[room(module)]


@pytest.mark.parametrize("module", sorted({*MODULES} - FRONTS))
def test_module_imports_nothing_from_a_higher_floor(module: str) -> None:
    up = [f"line {line}: {target}" for target, line in imports(module) if goes_up(module, target)]
    assert not up, f"{module} ({room(module)}) imports what stands above it: {'; '.join(up)}"


def test_every_folder_has_a_floor() -> None:
    assert {room(module) for module in MODULES} <= set(LEVEL)
