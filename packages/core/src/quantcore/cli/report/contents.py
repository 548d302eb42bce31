"""The page of `quantcore inspect`: what a folder stores, how many bits each layer takes, the values of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantcore.checkpoints.read import Checkpoint, quantization_dict
from quantcore.cli.inventory import Inventory, Row, reader_of
from quantcore.cli.output import Output, in_bytes, plural
from quantcore.cli.report import pictures, theme
from quantcore.cli.report.comparison import codes_picture, grid_table
from quantcore.cli.report.floats import kept_float
from quantcore.cli.report.grids import grid, mean
from quantcore.cli.report.options import Wanted
from quantcore.cli.report.page import Section, section
from quantcore.cli.report.pictures import Picture, Point
from quantcore.cli.report.text import Table, number
from quantcore.cli.report.writing import write_report
from quantcore.workflows.portrait import LayerValues
from quantcore.workflows.stored import stored_modules
from quantcore.workflows.stored_portrait import stored_float, stored_values

_MB = 1e6
_KINDS = 14  # bars; what is left over is one more


@dataclass(frozen=True)
class Contents:
    """A folder. layer: whose values are shown, where one could be read."""

    inventory: Inventory
    layer: str | None
    values: LayerValues | None
    left: dict[str, str]


def write_contents(wanted: Wanted, inventory: Inventory, output: Output) -> None:
    """Write the report on a folder. Raises ValueError for a layer that it does not have."""
    checkpoint = Checkpoint(inventory.directory)
    found = quantization_dict(checkpoint.config)
    chosen = _chosen(inventory, wanted.layer)
    values = None
    if chosen is not None:
        reader = None if found is None else reader_of(checkpoint, found)[0]
        modules = {module.name: module for module in stored_modules(checkpoint, reader, None)}
        values = stored_values(checkpoint, modules[chosen])
    dimensions = {
        row.module: [len(header.shape) for header in row.tensors.values()]
        for row in inventory.modules
        if not row.is_quantized
    }
    left = {} if found is None else stored_float(checkpoint, found, dimensions)
    contents = Contents(inventory, chosen, values, left)
    write_report(
        wanted,
        output,
        f"What {inventory.directory.name} stores",
        _summary(inventory),
        [("Folder", str(inventory.directory)), ("Method", inventory.method or "none: floats")],
        lambda: _pictures(contents),
        lambda drawn: _sections(contents, drawn),
    )


def _chosen(inventory: Inventory, layer: str | None) -> str | None:
    """The layer that was asked for, or the largest one that is quantized, or else the largest."""
    rows = {row.module: row for row in inventory.modules if row.shape is not None and len(row.shape) == 2}
    if layer is not None:
        if layer not in rows:
            some = ", ".join(list(rows)[:4])
            raise ValueError(f"--layer {layer}: {inventory.directory} has no such layer; it has {some} and others")
        return layer
    sound = [row for row in rows.values() if row.fault is None]
    return max(sound, key=lambda row: (row.is_quantized, row.weights or 0)).module if sound else None


def _summary(inventory: Inventory) -> str:
    quantized = [row for row in inventory.modules if row.is_quantized]
    size = in_bytes(sum(row.bytes for row in inventory.modules))
    if not quantized:
        return f"{plural(len(inventory.modules), 'module')} in floats, {size}."
    weights = sum(row.weights or 0 for row in quantized)
    total = sum(row.weights or 0 for row in inventory.modules)
    share = f"{100 * weights / total:.0f} % of the weights" if total else "no weights"
    return f"{plural(len(quantized), 'layer')} of {len(inventory.modules)} modules quantized: {share}; {size} in all."


def _pictures(contents: Contents) -> list[Picture]:
    found = [_bits(contents.inventory), _sizes(contents.inventory)]
    if contents.values is not None and contents.layer is not None:
        found += [_weights(contents.values, contents.layer), codes_picture(contents.values, contents.layer, "codes", 1)]
    return [picture for picture in found if picture is not None]


def _sections(contents: Contents, drawn: Sequence[Picture]) -> list[Section]:
    by_key = {picture.key: picture for picture in drawn}
    values = [by_key[key] for key in ("weights", "codes") if key in by_key]
    reason = contents.values.reason if contents.values is not None else ""
    lead = f"The weight of {contents.layer}; another one with --layer." if contents.layer else "No layer can be read."
    found = [
        section("all", "Formats", "How weights are stored.", [_formats(contents.inventory)]),
        section("sizes", "Where the bytes are", "By kind of layer.", [by_key["sizes"]]),
        section("values", "Values of a layer", lead + (f" No codes: {reason}." if reason else ""), values),
    ]
    if "bits" in by_key:
        lead = "All that is stored for a weight, scales and tables among it, over the number of weights."
        found.insert(1, section("bits", "Bits per weight", lead, [by_key["bits"]]))
    if contents.left:
        table = kept_float("Modules in floats", contents.left)
        found.append(section("float", "What stays float, and why", "Modules that are not quantized.", [table]))
    return found


def _formats(inventory: Inventory) -> Table:
    groups: dict[str, list[Row]] = {}
    for row in inventory.modules:
        groups.setdefault(row.format, []).append(row)
    rows = [(name, str(len(own)), *_size_cells(own)) for name, own in groups.items()]
    rows.append(("total", str(len(inventory.modules)), *_size_cells(inventory.modules)))
    return Table("Formats and what they take", ("format", "modules", "weights", "bits per weight", "size"), rows, True)


def _size_cells(rows: Sequence[Row]) -> tuple[str, str, str]:
    size, weights = sum(row.bytes for row in rows), [row.weights for row in rows if row.weights is not None]
    if len(weights) < len(rows) or not sum(weights):
        return "–", "–", in_bytes(size)
    return f"{sum(weights):,}", f"{8 * size / sum(weights):.3f}", in_bytes(size)


def _bits(inventory: Inventory) -> Picture | None:
    found = {row.module: row.bits_per_weight for row in inventory.modules if row.shape and len(row.shape) > 1}
    cells = grid({name: bits for name, bits in found.items() if bits is not None}, mean)
    if not cells.numbers:
        return None
    bounds = (min(cells.numbers), max(cells.numbers))
    image, tips = pictures.heat_map(cells, theme.BITS, "bits per weight", "bits", bounds)
    table = grid_table("Bits per weight", cells)
    return Picture(
        "bits", "Bits per weight", "From the first block, at the left, to the last.", table, image, tips, True
    )


def _sizes(inventory: Inventory) -> Picture:
    cells = grid({row.module: float(row.bytes) for row in inventory.modules}, math.fsum)
    sums = {
        kind: int(math.fsum(cell for cell in row if cell is not None))
        for kind, row in zip(cells.kinds, cells.cells, strict=True)
    }
    largest = sorted(sums, key=lambda kind: -sums[kind])
    shown = {kind or "(root)": sums[kind] for kind in largest[:_KINDS]}
    if len(largest) > _KINDS:
        shown["all others"] = sum(sums[kind] for kind in largest[_KINDS:])
    points = [Point(kind, size / _MB, series=1, text=in_bytes(size)) for kind, size in shown.items()]
    total = max(1, sum(sums.values()))
    rows = [(kind, in_bytes(size), f"{100 * size / total:.1f} %") for kind, size in shown.items()]
    table = Table("Bytes by kind of layer", ("kind", "bytes", "share"), rows)
    return Picture("sizes", "Bytes by kind of layer", "All blocks together.", table, pictures.bars([("bytes", points)]))


def _weights(values: LayerValues, layer: str) -> Picture:
    rows = [
        (f"{number(values.edges[place])} to {number(values.edges[place + 1])}", f"{count:,}")
        for place, count in enumerate(values.counts)
    ]
    table = Table(f"Weights of {layer} between two values", ("value", "weights"), rows)
    image = pictures.value_lines(values.edges, [(Point(layer, 0.0, series=1), values.counts)])
    text = "As they are multiplied: a quantized weight has the values of its format alone."
    return Picture("weights", "Weights", text, table, image, folded=True)
