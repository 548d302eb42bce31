"""Pictures of matplotlib as SVG inside of a page, in the page's own font and colours."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from quantcore._optional import require
from quantcore.cli.report import theme

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_FONT = re.compile(r"font: ([^;']*?)([\d.]+px)[^;]*")
_LONG_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DPI = 160  # of PNG files


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """While the block draws: text stays text, names are no formulas, and the same picture gives the same file."""
    matplotlib = require("matplotlib", "report")
    settings = {
        "axes.edgecolor": theme.light("line"),
        "axes.facecolor": "none",
        "axes.labelcolor": theme.light("muted"),
        "axes.labelsize": 9,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10,
        "figure.facecolor": theme.light("paper"),
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "grid.color": theme.light("line"),
        "grid.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "quantcore",
        "text.color": theme.light("ink"),
        "text.parse_math": False,
        "xtick.color": theme.light("line"),
        "xtick.labelcolor": theme.light("muted"),
        "ytick.color": theme.light("line"),
        "ytick.labelcolor": theme.light("muted"),
    }
    with matplotlib.rc_context(settings):
        yield


def figure(width: float, height: float) -> Any:
    """An empty picture of so many inches, which no window will ever show."""
    require("matplotlib", "report")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(picture: Any, path: Path) -> None:
    """Write a picture in the light colours."""
    picture.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def inline(picture: Any, key: str, name: str, tips: Mapping[str, str]) -> str:
    """The SVG element of a picture.

    key: a prefix that keeps its ids apart from those of others. name: what a screen reader says. tips: what a pointer
    shows, by the gid of a part.
    """
    buffer = io.StringIO()
    picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _adapt(root, key, tips)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.attrib |= {"role": "img", "aria-label": name}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, key: str, tips: Mapping[str, str]) -> None:
    element.tag = _local(element.tag)
    attributes = {_local(name): value for name, value in element.attrib.items()}
    tip = tips.get(attributes.get("id", ""))
    element.attrib = {name: _value(name, value, key) for name, value in attributes.items()}
    for child in list(element):
        if _local(child.tag) in ("metadata", "style"):  # a style would hold for the whole page
            element.remove(child)
        else:
            _adapt(child, key, tips)
    if tip is not None:
        title = ElementTree.Element("title")
        title.text = tip
        element.insert(0, title)


def _value(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    if name in ("d", "transform", "points", "x", "y"):
        return _LONG_NUMBER.sub(r"\1", value)
    value = _REFERENCE.sub(rf"url(#{key}-\1)", value)
    value = _COLOUR.sub(lambda found: theme.VARIABLES.get(found[0].lower(), found[0]), value)
    return _FONT.sub(r"font: \1\2 var(--sans)", value)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
