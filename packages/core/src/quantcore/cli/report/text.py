"""Names, numbers and tables as pages show them. Whatever comes from a checkpoint passes through here."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 300  # characters of a name
_PLAIN = 0x530  # the font of pictures has every printable character below


def visible(text: str, longest: int | None = _LONGEST) -> str:
    """A text whose control characters, and those that turn the direction of others, are written as escapes."""
    cut = text if longest is None or len(text) <= longest else f"{text[:longest]}..."
    return "".join(
        each if _is_plain(each) else each.encode("unicode_escape", "replace").decode("ascii") for each in cut
    )


def escaped(text: str, longest: int | None = _LONGEST) -> str:
    """A text that is safe between tags and in attributes."""
    return html.escape(visible(text, longest))


def label(text: str) -> str:
    """A text for pictures, whose font has fewer characters."""
    return "".join(each if ord(each) < _PLAIN else "?" for each in visible(text, 40))


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, or a dash for what is not known or no number."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}" if value else "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def interval(bounds: Sequence[float] | None, digits: int = 3) -> str:
    """ "4.61 to 4.75"."""
    return "–" if bounds is None else f"{number(bounds[0], digits)} to {number(bounds[1], digits)}"


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first column names the row. caption: what it shows. has_words: cells are sentences."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_words: bool = False

    def html(self, key: str) -> str:
        """The table in a box that scrolls by keys where it is too wide."""
        head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in self.columns)
        body = "\n".join(_row(cells) for cells in self.rows)
        caption = f'<caption id="{key}-caption">{escaped(self.caption)}</caption>'
        kind = ' class="words"' if self.has_words else ""
        table = f"<table{kind}>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        return f'<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">{table}</div>'


def shared_length(sequences: Sequence[Sequence[object]]) -> int:
    """How many items at the start all sequences have in common."""
    return next(
        (place for place, items in enumerate(zip(*sequences, strict=False)) if len(set(items)) > 1),
        min(map(len, sequences)),
    )


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return f'<tr><th scope="row">{escaped(first)}</th>{"".join(f"<td>{escaped(cell)}</td>" for cell in others)}</tr>'


def _is_plain(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs", "Cn")
