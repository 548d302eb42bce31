"""Writes docs/api.md, for users, and docs/sdk.md, for authors, from signatures and docstrings; `--check` only compares.

python docs/sdk_reference.py [--check]
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from quantcore import errors, sdk

DOCS = Path(__file__).parent
SDK_HEAD = """# What a backend imports

`quantcore.sdk` is the one module of quantcore that a backend imports. Each name is loaded when it is first asked for,
so that a hook's module stays cheap. `python docs/sdk_reference.py` writes this page from signatures and docstrings.
"""
API_HEAD = """# Python

What a program uses, each name by the module that it is imported from; authors of a method find theirs in
[What a backend imports](sdk.md). The settings of a config are in the help of `quantcore quantize --method NAME --help`.
`python docs/sdk_reference.py` writes this page from signatures and docstrings.
"""
# A section, and the names in it by their modules.
API: dict[str, dict[str, tuple[str, ...]]] = {
    "Models": {"quantcore": ("load", "quantize", "save", "dequantize")},
    "Files": {"quantcore": ("quantize_checkpoint", "convert")},
    "Methods and configs": {
        "quantcore": (
            "methods",
            "AutoQuantizationConfig",
            "AutoHfQuantizer",
            "register_quantization_config",
            "register_quantizer",
        )
    },
    "Layers": {"quantcore.nn": ("QuantizedLinear", "QuantizedEmbedding", "QuantizedExperts")},
    "Calibration": {
        "quantcore": ("Calibration",),
        "quantcore.calibration": ("report_of", "CalibrationReport", "LayerReport"),
    },
    "Quality": {"quantcore.evaluation.perplexity": ("perplexity", "Perplexity", "compare", "Comparison")},
    "transformers": {
        "quantcore.integrations.transformers": ("use", "enable", "disable", "build_model", "load_tokenizer")
    },
    "PEFT": {
        "quantcore.integrations.peft": (
            "get_peft_model",
            "add_adapter",
            "load_adapter",
            "prepare_model_for_kbit_training",
            "register",
            "merge_errors",
            "merge_to_float",
        )
    },
    "Errors": {"quantcore.errors": tuple(name for name in vars(errors) if name.endswith("Error"))},
}


def pages() -> dict[Path, str]:
    """The text of each page: a section for each of its table, an entry for each name."""
    api = {title: dict(_named(modules)) for title, modules in API.items()}
    ours = {title: {name: getattr(sdk, name) for name in names} for title, names in sdk.SECTIONS.items()}
    return {DOCS / "api.md": page(API_HEAD, api), DOCS / "sdk.md": page(SDK_HEAD, ours)}


def page(head: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    text = head + "".join(
        f"\n## {title}\n" + "".join(entry(name, value) for name, value in section.items())
        for title, section in sections.items()
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _named(modules: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Any]]:
    for module, names in modules.items():
        for name in names:
            yield f"{module}.{name}", getattr(importlib.import_module(module), name)


def entry(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        members = "".join(member_line(member, of) for member, of in public(value) if not inspect.ismodule(of))
        return f"\n### `{name}`\n\n{text_of(value)}\n\n{members}"
    if inspect.isclass(value):
        members = "".join(member_line(member, of) for member, of in public(value))
        return f"\n### `{name}`\n\n{text_of(value)}\n" + (f"\n{members}" if members else "")
    if inspect.isroutine(value):
        call = f"{name.rpartition('.')[2]}{signature(value)}"
        return f"\n### `{name}`\n\n`{call}`\n\n{text_of(value)}\n"
    return f"\n### `{name}`\n\n{constant(value)}\n"


def public(owner: Any) -> Iterator[tuple[str, Any]]:
    """Functions and classes that a module, or methods and properties that a class, defines itself.

    What a quantizer only describes, in a base of its own, counts as its own.
    """
    found = dict(vars(owner))
    for base in owner.__mro__[1:] if inspect.isclass(owner) else ():
        if hasattr(sdk, base.__name__) or base.__module__ != "quantcore.quantizers.described":
            break
        found = {**vars(base), **found}
    for name, value in found.items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        is_own = not inspect.ismodule(owner) or getattr(value, "__module__", "") == owner.__name__
        if not name.startswith("_") and is_own and (callable(value) or isinstance(value, property)):
            yield name, value


def member_line(name: str, value: Any) -> str:
    """One line of a list: the member and the first sentence of its docstring."""
    summary = text_of(value).partition("\n")[0] or "see the class that it is derived from"
    shown = name if isinstance(value, property) or inspect.isclass(value) else f"{name}{signature(value)}"
    return f"- `{shown}`: {summary}\n"


def signature(value: Any) -> str:
    """Parameters and result, without addresses of defaults; empty where Python cannot tell."""
    try:
        text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value))).replace(
            "<dataclasses._MISSING_TYPE object>", "..."
        )
        return re.sub(r" at 0x[0-9a-f]+", "", text).replace("<dataclasses._MISSING_TYPE object>", "...")
    except (TypeError, ValueError):
        return "(...)"


def text_of(value: Any) -> str:
    """The docstring; nothing for what has none of its own, as dataclasses that repeat their signature."""
    text = inspect.cleandoc(value.__doc__ or "") if isinstance(value.__doc__, str) else ""
    return "" if text.startswith(f"{getattr(value, '__name__', '')}(") else text


def constant(value: Any) -> str:
    shown = repr(value)
    return f"`{shown}`" if len(shown) < 200 and " at 0x" not in shown else f"A {type(value).__name__}."


def main() -> int:
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    if "--check" in sys.argv:
        for path in stale:
            print(f"docs/{path.name} is out of date; run python docs/sdk_reference.py", file=sys.stderr)
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
