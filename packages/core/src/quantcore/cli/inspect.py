"""`quantcore inspect`: what a checkpoint folder stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from quantcore.cli.completing import folders
from quantcore.cli.group import Verb
from quantcore.cli.output import Output, in_bytes, output_options, table
from quantcore.cli.report.options import Wanted, report_options
from quantcore.cli.sizes import bits, size_table

if TYPE_CHECKING:
    from quantcore.cli.inventory import Inventory, Row

EXAMPLES = (
    "quantcore inspect examples/stdlib-lm",
    "quantcore inspect examples/stdlib-lm --tensors",
    "quantcore inspect examples/stdlib-lm --html stored.html --force",
)


@click.command("inspect", cls=Verb, examples=EXAMPLES)
@click.argument("directory", metavar="DIR", shell_complete=folders)
@click.option("--tensors", is_flag=True, help="List every tensor instead of every module.")
@report_options("bits, sizes, weights, codes [default: bits]", "the largest")
@output_options(brief="only the bits per weight of the whole checkpoint")
def command(
    directory: str,
    tensors: bool,
    report: Wanted,
    output: Output,
) -> None:
    """Show what the checkpoint folder DIR stores: modules, formats, shapes, bits per weight, bytes.

    Reads headers only, and needs no architecture. A damaged layer is named, and the exit status is then 1.
    With --html it becomes a page of pictures, with the values of one layer, which are read for it.
    """
    from quantcore.checkpoints.read import resolve
    from quantcore.cli.inventory import take_inventory

    inventory = take_inventory(resolve(directory))
    if inventory.note:
        output.note(f"warning: {inventory.note}")
    if report.any:
        from quantcore.cli.report.contents import write_contents

        write_contents(report, inventory, output)
    totals = _totals(inventory)
    data = _tensor_rows(inventory) if tensors else [_module_row(module) for module in inventory.modules]
    head = {"directory": str(inventory.directory), "method": inventory.method, **totals}
    output.result(
        {**head, "tensors" if tensors else "modules": data},
        lambda: f"{_tensor_table(data) if tensors else _module_table(inventory)}\n\n{_summary(inventory)}",
        bits(totals["bits_per_weight"]),
    )
    faults = [f"{module.module}: {module.fault}" for module in inventory.modules if module.fault]
    if faults:
        raise ValueError(f"{inventory.directory}: {len(faults)} layers are damaged\n" + "\n".join(faults))


def _module_row(module: Row) -> dict[str, Any]:
    fields = ("module", "format", "is_quantized", "shape", "weights", "bits_per_weight", "bytes", "fault")
    return {field: getattr(module, field) for field in fields}


def _tensor_rows(inventory: Inventory) -> list[dict[str, Any]]:
    from quantcore.formats.base import dtype_name

    return [
        {
            "module": module.module,
            "tensor": suffix,
            "dtype": dtype_name(header.dtype),
            "shape": header.shape,
            "bytes": header.nbytes,
            "file": header.file,
        }
        for module in inventory.modules
        for suffix, header in module.tensors.items()
    ]


def _module_table(inventory: Inventory) -> str:
    labels = _labels(inventory)
    rows = [
        (
            module.module or "(root)",
            labels[module.format],
            "-" if module.shape is None else _spell(module.shape),
            bits(module.bits_per_weight),
            f"{module.bytes:,}",
        )
        for module in inventory.modules
    ]
    columns = ("module", "format", "shape", "bits/weight", "bytes")
    return table(columns, rows, right=("bits/weight", "bytes"))


def _tensor_table(data: list[dict[str, Any]]) -> str:
    columns = ("module", "tensor", "dtype", "shape", "bytes")
    rows = [
        [row["module"] or "(root)", row["tensor"], row["dtype"], _spell(row["shape"]), f"{row['bytes']:,}"]
        for row in data
    ]
    return table(columns, rows, right=("bytes",))


def _summary(inventory: Inventory) -> str:
    lines = [f"method: {inventory.method or 'none, a float checkpoint'}"]
    labels = _labels(inventory)
    quantized = Counter(module.format for module in inventory.modules if module.is_quantized)
    lines += [f"{labels[name]} ({count} modules): {name}" for name, count in quantized.items() if labels[name] != name]
    from quantcore.workflows.evaluation import disk_bytes

    files = f"files of weights: {in_bytes(disk_bytes(inventory.directory))}"
    return "\n".join([*lines, "", size_table(_parts(inventory)), files])


def _parts(inventory: Inventory) -> list[tuple[str, int | None, int]]:
    """Rows of the size table; the bytes of a quantized layer's bias count as quantized."""
    parts = {
        "quantized": [module for module in inventory.modules if module.is_quantized],
        "float": [module for module in inventory.modules if not module.is_quantized],
        "total": inventory.modules,
    }
    return [(name, *_sizes(modules)) for name, modules in parts.items() if modules]


def _sizes(modules: Sequence[Row]) -> tuple[int | None, int]:
    """Number of weights, None when that of one module is unknown, and bytes."""
    weights = [module.weights for module in modules if module.weights is not None]
    return sum(weights) if len(weights) == len(modules) else None, sum(module.bytes for module in modules)


def _totals(inventory: Inventory) -> dict[str, Any]:
    weights, size = _sizes(inventory.modules)
    return {"bytes": size, "weights": weights, "bits_per_weight": 8 * size / weights if weights else None}


def _labels(inventory: Inventory) -> dict[str, str]:
    """A short name for each format: its class, with a number where a class has several variants."""
    formats = list(dict.fromkeys(module.format for module in inventory.modules))
    names = [name.partition("(")[0] for name in formats]
    total = Counter(names)
    seen: Counter[str] = Counter()
    labels = {}
    for text, name in zip(formats, names, strict=True):
        seen[name] += 1
        labels[text] = f"{name} #{seen[name]}" if total[name] > 1 else name
    return labels


def _spell(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
