"""The pictures of reports, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantcore._optional import require
from quantcore.cli.report import theme
from quantcore.cli.report.grids import OUTSIDE, Grid
from quantcore.cli.report.svg import figure
from quantcore.cli.report.text import Table, label, number

WIDTH = 7.6  # inches, of every picture
_ROW = 0.3  # inches of a bar or a row of cells
_MARGIN = 1.0  # inches of titles and scales


@dataclass(frozen=True)
class Picture:
    """A picture with its numbers. key: for --picture. tips: what a pointer shows, by gid. image: None where nothing
    can be drawn of the numbers, which stand in the table all the same. folded: whether the table is opened on demand.
    """

    key: str
    title: str
    text: str
    table: Table
    image: Any = None
    tips: Mapping[str, str] = field(default_factory=dict)
    folded: bool = False


@dataclass(frozen=True)
class Point:
    """A number of one model with its bounds. series: the place of the model among all."""

    name: str
    value: float
    bounds: tuple[float, float] | None = None
    series: int = 0
    text: str = ""


def is_drawn(value: float, is_log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not is_log)


def quality_by_size(points: Sequence[tuple[Point, Point]], front: Sequence[int], reference: Point) -> Any:
    """KL divergence over size in MB; front: the points that no other beats in both. None where none can be drawn."""
    shown = [place for place, (size, loss) in enumerate(points) if is_drawn(loss.value, is_log=True)]
    if not shown:
        return None
    picture = figure(WIDTH, 4.2)
    axes = picture.add_subplot()
    axes.set_yscale("log")
    _plain_powers(axes.yaxis)
    axes.set_xlabel("size of the weights, MB: smaller is further left")
    axes.set_ylabel("KL divergence, nats a token: better is lower")
    axes.grid(True, which="major")
    steps = sorted((points[place] for place in front if place in shown), key=lambda pair: pair[0].value)
    xs, ys = [size.value for size, _ in steps], [loss.value for _, loss in steps]
    axes.step(xs, ys, where="post", color=theme.light("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place in shown:
        _dot(axes, *points[place])
    axes.axvline(reference.value, color=theme.series(0), linewidth=1)
    axes.annotate(
        label(f"{reference.name}, {number(reference.value)} MB"),
        (reference.value, 1),
        (-5, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="top",
        color=theme.light("muted"),
    )
    axes.set_xlim(0, 1.04 * max(reference.value, *(points[place][0].value for place in shown)))
    lows, highs = zip(
        *((loss.bounds or (loss.value,) * 2) for _, loss in (points[place] for place in shown)), strict=True
    )
    lowest = (
        min(low for low in lows if low > 0) if any(low > 0 for low in lows) else min(loss.value for _, loss in points)
    )
    axes.set_ylim(lowest / 1.8, max(highs) * 2.2)
    _name_points(picture, axes, [points[place] for place in shown])
    return picture


def intervals(panels: Sequence[tuple[str, Sequence[Point], bool]]) -> Any:
    """A dot with its bounds for each model; a panel for each measure.

    panels: title, points, whether the scale goes by powers of ten.
    """
    rows = max(len(points) for _, points, _ in panels)
    picture = figure(WIDTH, _MARGIN + _ROW * rows)
    for axes, (title, points, is_log) in zip(_panels(picture, len(panels)), panels, strict=True):
        _rows(axes, points)
        axes.set_title(title, loc="left")
        if is_log and _spans_powers([point for point in points if is_drawn(point.value, is_log)]):
            axes.set_xscale("log")
        for place, point in enumerate(points):
            if not is_drawn(point.value, is_log):
                continue
            low, high = point.bounds or (point.value, point.value)
            axes.plot([low, high], [place, place], color=theme.series(point.series), linewidth=2, solid_capstyle="butt")
            axes.plot(
                [point.value],
                [place],
                marker=theme.marker(point.series),
                color=theme.series(point.series),
                markersize=6,
            )
        axes.margins(x=0.12)
        axes.grid(True, axis="x")
        _few_ticks(axes, is_log)
    return picture


def bars(panels: Sequence[tuple[str, Sequence[Point]]]) -> Any:
    """A bar with its number for each model; a panel for each measure."""
    rows = max(len(points) for _, points in panels)
    picture = figure(WIDTH, _MARGIN - 0.35 + _ROW * rows)
    for axes, (title, points) in zip(_panels(picture, len(panels)), panels, strict=True):
        _rows(axes, points)
        axes.set_title(title, loc="left")
        values = [point.value if math.isfinite(point.value) else 0 for point in points]
        axes.barh(range(len(points)), values, 0.6, color=[theme.series(point.series) for point in points])
        for place, (point, value) in enumerate(zip(points, values, strict=True)):
            axes.annotate(point.text, (value, place), (4, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.34 * max([*values, 1e-9]))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return picture


def heat_map(
    cells: Grid, colours: Sequence[tuple[str, str]], scale: str, key: str, bounds: tuple[float, float]
) -> tuple[Any, dict[str, str]]:
    """A cell for each layer, with what a pointer shows over it. bounds: of the numbers of all maps beside it."""
    require("matplotlib", "report")
    from matplotlib.patches import Rectangle

    wide = min(1.0, 0.34 * len(cells.depths) / 5)
    picture = figure(WIDTH, _MARGIN + 0.12 + 0.24 * len(cells.kinds))
    axes = picture.add_subplot()
    limits = _steps(bounds, len(colours))
    tips = {}
    for row, kind in enumerate(cells.kinds):
        for column, depth in enumerate(cells.depths):
            value = cells.cells[row][column]
            if value is None:
                continue
            place = sum(value >= limit for limit in limits[1:-1]) if bounds[0] < bounds[1] else len(colours) // 2
            colour = colours[place][0]
            gid = f"{key}-{row}-{column}"
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=theme.light("paper"), linewidth=1, gid=gid)
            )
            where = f"block {depth}, " if depth != OUTSIDE else ""
            tips[gid] = label(f"{where}{kind}: {number(value)}")
    axes.set_xlim(0, max(len(cells.depths), 5 if wide < 1 else 1))
    axes.set_ylim(len(cells.kinds), 0)
    every = math.ceil(len(cells.depths) / 24)
    places = range(0, len(cells.depths), every)
    axes.set_xticks([place + 0.5 for place in places], [cells.depths[place] for place in places])
    axes.set_yticks([place + 0.5 for place in range(len(cells.kinds))], [label(kind) for kind in cells.kinds])
    axes.tick_params(length=0)
    axes.set_xlabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if bounds[0] < bounds[1]:
        _key_of_colours(picture, axes, colours, limits, scale)
    else:
        axes.set_title(label(f"{scale}: {number(bounds[0])} everywhere"), loc="left", color=theme.light("muted"))
    return picture, tips


def value_lines(edges: Sequence[float], lines: Sequence[tuple[Point, Sequence[int]]]) -> Any:
    """How values are spread: the first line filled, the others over it."""
    picture = figure(WIDTH, 3.0)
    axes = picture.add_subplot()
    for point, counts in lines:
        is_first = point is lines[0][0]
        total = max(1, sum(counts))
        axes.stairs(
            [100 * count / total for count in counts],
            edges,
            fill=is_first,
            color=theme.series(point.series),
            alpha=0.28 if is_first else None,
            linewidth=1.4,
            label=label(point.name),
        )
    axes.set_xlabel("value of a weight")
    axes.set_ylabel("% of the weights")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0)
    axes.grid(True, axis="y")
    axes.legend(frameon=False, loc="upper right", labelcolor=theme.light("ink"))
    return picture


def code_bars(first: Sequence[int], counts: Sequence[int], width: int, series: int) -> Any:
    """How often each code occurs."""
    picture = figure(WIDTH, 1.9)
    axes = picture.add_subplot()
    total = max(1, sum(counts))
    axes.bar(first, [100 * count / total for count in counts], 0.86 * width, align="edge", color=theme.series(series))
    axes.set_xlabel("code" if width == 1 else f"code, {width} a bar")
    axes.set_ylabel("% of the codes")
    axes.set_xlim(first[0] - 0.5 * width, first[-1] + 1.5 * width)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    return picture


def _dot(axes: Any, size: Point, loss: Point) -> None:
    colour = theme.series(loss.series)
    if loss.bounds is not None:
        axes.plot([size.value] * 2, [max(bound, 1e-12) for bound in loss.bounds], color=colour, linewidth=1.6)
    axes.plot([size.value], [loss.value], marker=theme.marker(loss.series), color=colour, markersize=8, zorder=3)


def _name_points(picture: Any, axes: Any, points: Sequence[tuple[Point, Point]]) -> None:
    """Names beside points, to the left of those far right, moved up where two would meet."""
    picture.draw_without_rendering()
    right = axes.get_xlim()[1]
    placed: list[tuple[float, float]] = []
    at = [(axes.transData.transform((size.value, loss.value)), size, loss) for size, loss in points]
    for (x, y), size, loss in sorted(at, key=lambda item: item[0][1]):
        height = y
        while any(abs(height - other) < 13 and abs(x - left) < 150 for left, other in placed):
            height += 3
        placed.append((x, height))
        is_left = size.value > 0.6 * right
        shift = (-9 if is_left else 9, 7 + (height - y) * 72 / picture.dpi)
        axes.annotate(
            label(loss.name),
            (size.value, loss.value),
            shift,
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
        )


def _panels(picture: Any, count: int) -> list[Any]:
    found = picture.subplots(1, count, sharey=True, squeeze=False)
    return list(found[0])


def _rows(axes: Any, points: Sequence[Point]) -> None:
    axes.set_yticks(range(len(points)), [label(point.name) for point in points])
    axes.tick_params(axis="y", length=0, labelcolor=theme.light("ink"))
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)


def _spans_powers(points: Sequence[Point]) -> bool:
    """Whether bounds lie so far apart that a scale by powers of ten has several ticks between them."""
    ends = [end for point in points for end in point.bounds or (point.value, point.value)]
    return bool(ends) and min(ends) > 0 and max(ends) / min(ends) > 10


def _few_ticks(axes: Any, is_log: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    if is_log and axes.get_xscale() == "log":
        _plain_powers(axes.xaxis)
        return
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _plain_powers(axis: Any) -> None:
    """Ticks at 1, 3, 10 and so on, as numbers that are no formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _steps(bounds: tuple[float, float], count: int) -> list[float]:
    """Limits of colours, by equal factors where numbers differ much, else by equal differences."""
    low, high = bounds
    if low > 0 and high / low > 4:
        return [low * (high / low) ** (place / count) for place in range(count + 1)]
    high = high if high > low else low + 1
    return [low + (high - low) * place / count for place in range(count + 1)]


def _key_of_colours(
    picture: Any, axes: Any, colours: Sequence[tuple[str, str]], limits: Sequence[float], scale: str
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(limits, len(colours))
    mapped = ScalarMappable(norm, ListedColormap([pair[0] for pair in colours]))
    bar = picture.colorbar(mapped, ax=axes, orientation="horizontal", aspect=46, pad=0.02, location="top", shrink=0.6)
    bar.ax.set_title(scale, loc="left", fontsize=9, color=theme.light("muted"))
    bar.outline.set_visible(False)
    shown = limits[:: max(1, len(colours) // 4)]
    bar.set_ticks(list(shown), labels=[number(limit, 2) for limit in shown])
    bar.ax.tick_params(length=0)
