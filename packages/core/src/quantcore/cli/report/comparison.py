"""The page of `quantcore compare`: quality against size, layer by layer, speed, memory, words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from quantcore.cli.output import in_bytes, plural
from quantcore.cli.report import pictures, theme
from quantcore.cli.report.continuations import continuations
from quantcore.cli.report.floats import kept_float
from quantcore.cli.report.grids import OUTSIDE, Grid, grid, root_mean_square
from quantcore.cli.report.page import Section, section
from quantcore.cli.report.pictures import Picture, Point
from quantcore.cli.report.text import Table, interval, number
from quantcore.workflows.portrait import LayerValues, Portrait

_MB = 1e6


@dataclass(frozen=True)
class Compared:
    """One model of a comparison. name: as the user gave it. row: what `quantcore compare --json` prints of it."""

    name: str
    row: Mapping[str, Any]
    portrait: Portrait


@dataclass(frozen=True)
class Comparison:
    """Models on a text, the reference first. layer: whose values are shown; prompts: what was continued."""

    models: Sequence[Compared]
    layer: str | None
    prompts: Sequence[str]

    @property
    def names(self) -> list[str]:
        """A short name for each model."""
        return short_names([model.name for model in self.models])

    @property
    def others(self) -> list[tuple[int, str, Compared]]:
        """What is compared with the reference: place, short name, model."""
        return [(place, name, model) for place, (name, model) in enumerate(zip(self.names, self.models, strict=True))][
            1:
        ]


def short_names(names: Sequence[str]) -> list[str]:
    """The last words of paths, as many as tell them apart; a number where the same is given twice."""
    parts = [[part for part in name.removesuffix(".json").split(os.sep) if part] or [name] for name in names]
    short = ["/".join(words[-2:]) if words[-1] == "config" else words[-1] for words in parts]
    for length in range(2, max(map(len, parts)) + 1):
        if len(set(short)) == len(short):
            break
        twice = {name for name in short if short.count(name) > 1}
        short = ["/".join(words[-length:]) if name in twice else name for name, words in zip(short, parts, strict=True)]
    return [
        f"{name} #{short[:place].count(name) + 1}" if name in short[:place] else name
        for place, name in enumerate(short)
    ]


def front(sizes: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The places that no other beats: none is as small and as near, and better in one of the two."""
    pairs = list(zip(sizes, losses, strict=True))
    return [
        place
        for place, (size, loss) in enumerate(pairs)
        if not any(other <= size and near <= loss and (other, near) != (size, loss) for other, near in pairs)
    ]


def summary(compared: Comparison) -> str:
    """The finding, in two sentences."""
    rows = [model.row for _, _, model in compared.others]
    names = [name for _, name, _ in compared.others]
    near = min(range(len(rows)), key=lambda place: rows[place]["kl_divergence"])
    small = min(range(len(rows)), key=lambda place: rows[place]["disk_bytes"])
    whole = compared.models[0].row["disk_bytes"]
    share = f"{in_bytes(rows[small]['disk_bytes'])}, {100 * rows[small]['disk_bytes'] / whole:.0f} % of the original"
    nearest = f"KL divergence {number(rows[near]['kl_divergence'])} nats a token"
    if near == small:
        return f"{names[near]} is the nearest to the original ({nearest}) and the smallest ({share})."
    return f"{names[near]} is the nearest to the original ({nearest}). {names[small]} is the smallest ({share})."


def comparison_pictures(compared: Comparison) -> list[Picture]:
    """Every picture of the page, in its order."""
    return [picture for picture in map(_call, _makers(compared)) if picture is not None]


def comparison_sections(compared: Comparison, drawn: Sequence[Picture]) -> list[Section]:
    """The parts of the page, with the pictures that were drawn for it."""
    by_key = {picture.key: picture for picture in drawn}
    maps = [picture for picture in drawn if picture.key.startswith("error")]
    values = [picture for picture in drawn if picture.key == "weights" or picture.key.startswith("codes")]
    found = [
        section("all", "All figures", "The first row is what the others are compared with.", [_table(compared)]),
        section(
            "size",
            "Quality against size",
            "Models on the dashed line are not beaten: no other is both smaller and nearer to the original.",
            [by_key["size"]],
        ),
        section(
            "quality",
            "How sure the figures are",
            "Bars are 95 % intervals: the windows of the text are drawn anew 2,000 times. Windows differ much, so the "
            "interval of a perplexity is wide; its ratio to that of the original and the KL divergence are of the same "
            "windows. Where two of those overlap, the text is too short to tell which model is better.",
            [by_key["quality"]],
        ),
        section(
            "layers",
            "Error layer by layer",
            "Each quantized layer gets the inputs that the original gives it: the norm of the difference of the "
            "outputs over the norm of the output. Colours mean the same in every picture.",
            maps or ["<p>No layer is quantized.</p>"],
        ),
        section(
            "speed",
            "Speed",
            "On this machine, in this run: what else it did at the time shows here.",
            [by_key["speed"]],
        ),
        section("memory", "Memory", "Files on disk, and the tensors of the loaded model.", [by_key["memory"]]),
        section(
            "values",
            "Values of a layer",
            f"The weight of {compared.layer}; another one with --layer." if compared.layer else "No layer was chosen.",
            values,
        ),
        section(
            "float",
            "What stays float, and why",
            "Layers that are not quantized.",
            _kept_float(compared),
        ),
    ]
    texts = [model.portrait.texts for model in compared.models]
    if all(texts):
        lead = "The likeliest token each time. What comes after the first difference from the original is marked."
        body = continuations(compared.names, compared.prompts, texts)
        found.append(Section("texts", "Continuations side by side", lead, body))
    return found


def _call(maker: Any) -> Picture | None:
    found: Picture | None = maker()
    return found


def _makers(compared: Comparison) -> Iterable[Any]:
    yield partial(_by_size, compared)
    yield partial(_quality, compared)
    yield from _error_maps(compared)
    yield partial(_speed, compared)
    yield partial(_memory, compared)
    yield partial(_weights, compared)
    yield from (partial(_codes, place, name, model) for place, name, model in compared.others)


def _table(compared: Comparison) -> Table:
    columns = (
        "model",
        "method",
        "size",
        "in memory",
        "perplexity",
        "KL divergence",
        "same first choice",
        "reads, tokens/s",
    )
    rows = [
        (
            name,
            model.portrait.method or "float",
            in_bytes(model.row["disk_bytes"]),
            in_bytes(model.portrait.memory_bytes),
            number(model.row["perplexity"], 4),
            number(model.row["kl_divergence"]),
            f"{100 * model.row['top1_agreement']:.1f} %",
            number(model.row["tokens_per_second"]),
        )
        for name, model in zip(compared.names, compared.models, strict=True)
    ]
    return Table(f"Over {compared.models[0].row['tokens']:,} tokens", columns, rows)


def _by_size(compared: Comparison) -> Picture:
    pairs = [
        (
            Point(name, model.row["disk_bytes"] / _MB, series=place),
            Point(name, model.row["kl_divergence"], model.row["kl_interval"], place),
        )
        for place, name, model in compared.others
    ]
    best = front([size.value for size, _ in pairs], [loss.value for _, loss in pairs])
    reference = Point(compared.names[0], compared.models[0].row["disk_bytes"] / _MB)
    rows = [
        (size.name, f"{size.value:,.2f}", number(loss.value), interval(loss.bounds), "yes" if place in best else "no")
        for place, (size, loss) in enumerate(pairs)
    ]
    table = Table(
        "Size and distance of each model", ("model", "MB", "KL divergence", "95 % interval", "not beaten"), rows
    )
    text = "Nearer to the lower left corner is better. The upright line is the size of the original."
    return Picture("size", "Quality against size", text, table, pictures.quality_by_size(pairs, best, reference))


def _quality(compared: Comparison) -> Picture:
    named = list(enumerate(zip(compared.names, compared.models, strict=True)))
    perplexity = [Point(name, m.row["perplexity"], m.row["perplexity_interval"], place) for place, (name, m) in named]
    divergence = [Point(name, m.row["kl_divergence"], m.row["kl_interval"], place) for place, (name, m) in named]
    whole = perplexity[0].value
    ratio = [Point(name, m.row["perplexity"] / whole, m.row["ratio_interval"], place) for place, (name, m) in named]
    measures = [(perplexity, 4), (ratio, 4), (divergence, 3)]
    rows = [
        (name, *(cell for points, digits in measures for cell in _with_bounds(points[place], digits)))
        for place, (name, _) in named
    ]
    bounds = "95 % interval"
    columns = ("model", "perplexity", bounds, "of the original's", bounds, "KL divergence", bounds)
    table = Table("Perplexity and KL divergence with their bounds", columns, rows)
    text = (
        "Left: how well each predicts the text. Middle: over the perplexity of the original. Right: how far its "
        "predictions are from those of the original, nats a token."
    )
    panels = [
        ("perplexity", perplexity, False),
        ("over the original's", ratio, False),
        ("KL divergence", divergence, True),
    ]
    return Picture("quality", "Perplexity and KL divergence", text, table, pictures.intervals(panels))


def _kept_float(compared: Comparison) -> list[Table]:
    """A table for each set of models that keep the same."""
    tables: list[tuple[Mapping[str, str], list[str]]] = []
    for _, name, model in compared.others:
        names = next((names for left, names in tables if left == model.portrait.left), None)
        if names is None:
            tables.append((model.portrait.left, [name]))
        else:
            names.append(name)
    return [kept_float(f"In floats in {', '.join(names)}", left) for left, names in tables]


def _with_bounds(point: Point, digits: int) -> tuple[str, str]:
    return number(point.value, digits), interval(point.bounds, digits)


def _error_maps(compared: Comparison) -> Iterable[Any]:
    grids = [(name, grid(model.portrait.errors, root_mean_square)) for _, name, model in compared.others]
    numbers = [value for _, cells in grids for value in cells.numbers]
    bounds = (min(numbers, default=0.0), max(numbers, default=1.0))
    for place, (name, cells) in enumerate(grids, 1):
        if cells.numbers:
            key = "error" if place == 1 else f"error-{place}"
            yield partial(_error_map, key, name, cells, bounds)


def _error_map(key: str, name: str, cells: Grid, bounds: tuple[float, float]) -> Picture:
    image, tips = pictures.heat_map(cells, theme.ERRORS, "relative error of the outputs", key, bounds)
    table = grid_table(f"Relative error of the outputs of {name}", cells)
    return Picture(key, name, "From the first block, at the left, to the last.", table, image, tips, folded=True)


def grid_table(caption: str, cells: Grid) -> Table:
    """The numbers of a grid: a row for each depth, for pages are long rather than wide."""
    rows = [
        ("outside of blocks" if depth == OUTSIDE else depth, *(number(row[place]) for row in cells.cells))
        for place, depth in enumerate(cells.depths)
    ]
    return Table(caption, ("block", *cells.kinds), rows)


def _speed(compared: Comparison) -> Picture:
    reading, writing = [], []
    for place, (name, model) in enumerate(zip(compared.names, compared.models, strict=True)):
        speed, texts = model.row["tokens_per_second"], model.portrait.texts
        reading.append(Point(name, speed, series=place, text=number(speed)))
        if texts:
            steps, seconds = sum(max(0, text.tokens - 1) for text in texts), sum(text.seconds for text in texts)
            speed = steps / seconds if seconds else 0.0
            writing.append(Point(name, speed, series=place, text=number(speed)))
    columns = ("model", "reading, tokens/s", *(["writing, tokens/s"] if writing else []))
    rows = [(one.name, one.text, *([writing[place].text] if writing else [])) for place, one in enumerate(reading)]
    table = Table("Tokens a second", columns, rows)
    panels = [("reading the text, tokens/s", reading), *([("writing one text, tokens/s", writing)] if writing else [])]
    text = "Reading: windows of the text, several at a time. Writing: the continuations below, token by token."
    return Picture("speed", "Tokens a second", text, table, pictures.bars(panels))


def _memory(compared: Comparison) -> Picture:
    named = list(enumerate(zip(compared.names, compared.models, strict=True)))
    disk = [(place, name, model.row["disk_bytes"]) for place, (name, model) in named]
    memory = [(place, name, model.portrait.memory_bytes) for place, (name, model) in named]
    panels = [
        (title, [Point(name, size / _MB, series=place, text=in_bytes(size)) for place, name, size in sizes])
        for title, sizes in (("weights on disk", disk), ("tensors in memory", memory))
    ]
    rows = [
        (name, in_bytes(size), in_bytes(loaded), f"{100 * loaded / max(1, memory[0][2]):.0f} %")
        for (_, name, size), (_, _, loaded) in zip(disk, memory, strict=True)
    ]
    columns = ("model", "on disk", "in memory", "of the original's memory")
    text = "What is quantized in memory has no file: its tensors count."
    return Picture("memory", "Bytes", text, Table("Bytes of each model", columns, rows), pictures.bars(panels))


def _weights(compared: Comparison) -> Picture | None:
    found: list[tuple[Point, LayerValues]] = [
        (Point(name, 0.0, series=place), model.portrait.values)
        for place, (name, model) in enumerate(zip(compared.names, compared.models, strict=True))
        if model.portrait.values is not None
    ]
    if not found:
        return None
    edges = found[0][1].edges
    rows = [
        (f"{number(low)} to {number(high)}", *(f"{values.counts[place]:,}" for _, values in found))
        for place, (low, high) in enumerate(pairwise(edges))
    ]
    table = Table(
        f"Weights of {compared.layer} between two values", ("value", *(point.name for point, _ in found)), rows
    )
    text = "The original's are filled. Quantized ones gather at the values that the format has."
    image = pictures.value_lines(edges, [(point, values.counts) for point, values in found])
    return Picture("weights", "Weights", text, table, image, folded=True)


def _codes(place: int, name: str, model: Compared) -> Picture | None:
    values = model.portrait.values
    return None if values is None else codes_picture(values, name, f"codes-{place}", place)


def codes_picture(values: LayerValues, name: str, key: str, place: int) -> Picture | None:
    """How often each code of a layer occurs; None where there are no codes."""
    if values.codes is None:
        return None
    first, counts, width = values.codes.first, values.codes.counts, values.codes.width
    rows = [
        (str(code) if width == 1 else f"{code} to {code + width - 1}", f"{count:,}")
        for code, count in zip(first, counts, strict=True)
    ]
    table = Table(f"Codes of {name}", ("code", "count"), rows)
    text = f"{plural(sum(counts), 'code')}. A flat row uses the bits well; one tall bar wastes them."
    return Picture(key, f"Codes: {name}", text, table, pictures.code_bars(first, counts, width, place), folded=True)
