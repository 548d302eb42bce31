"""Writes the table of methods in README.md from what is installed; `--check` only compares.

python docs/methods_table.py [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantcore as qc
from quantcore.plugins.manager import plugins

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
SHAPE = (4096, 4096)


def table() -> str:
    """One row per declared example config of each installed method, sizes for a 4096 x 4096 bfloat16 weight."""
    head = "| method | install | config | bits per weight | family | quantizes |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows())


def rows() -> Iterator[tuple[str, ...]]:
    with torch.device("meta"):
        linear = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    for info in qc.methods():
        if not info.installed:
            continue
        backend = plugins().backend(info.method)
        package = f"`quantcore[{info.extra}]`" if info.extra else info.distributions[0]
        for example in backend.example_configs:
            quantizer = qc.AutoHfQuantizer.from_config({**example, "quant_method": info.method}, pre_quantized=True)
            assert isinstance(quantizer, qc.WeightQuantizer)
            weight_format = quantizer.format_for("layer", linear)
            assert weight_format is not None
            yield (
                f"`{info.method}`",
                package,
                ", ".join(f"`{key}={_brief(value)}`" for key, value in example.items()) or "defaults",
                f"{weight_format.bits_per_weight(SHAPE):.2f}",
                weight_format.family or "",
                "with calibration data" if backend.needs_calibration else "without data",
            )


def _brief(value: Any) -> str:
    """A value as a table cell shows it: of nested settings what tells one example from another."""
    if not isinstance(value, dict):
        return str(value)
    found = {key: inner for key, inner in value.items() if isinstance(inner, dict)}
    if found:
        return "; ".join(f"{key}: {_brief(inner)}" for key, inner in found.items())
    return " ".join(str(value[key]) for key in ("type", "num_bits", "dtype", "qscheme", "group_size") if value.get(key))


def main() -> int:
    text = README.read_text()
    made = BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", text)
    if "--check" in sys.argv:
        if made != text:
            print("README.md: the table of methods is out of date; run python docs/methods_table.py", file=sys.stderr)
        return int(made != text)
    README.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
