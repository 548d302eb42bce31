"""Attributes that are imported on first use, so that a package's import stays cheap."""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which `import quantcore` must not load
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def attributes(package: str, targets: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a package whose public names live in other modules.

    targets maps a public name to the module that defines it, or to "module:name" where it has another name there; a
    name equal to the module's last part gives the module.
    """

    def __getattr__(name: str) -> Any:
        if name not in targets:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        import importlib

        module_name, _, attribute = targets[name].partition(":")
        module = importlib.import_module(module_name)
        is_module = not attribute and module_name.rpartition(".")[2] == name
        return module if is_module else getattr(module, attribute or name)

    def __dir__() -> list[str]:
        return sorted(targets)

    return __getattr__, __dir__
