"""The colours of pictures and pages: pictures are drawn in the light ones, and a page turns them to variables."""

from __future__ import annotations

from collections.abc import Mapping

# name: in the light, in the dark
INK: Mapping[str, tuple[str, str]] = {
    "paper": ("#fefefe", "#14171c"),
    "raised": ("#f5f7f9", "#1b2027"),
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#57606c", "#a3adb9"),
    "line": ("#d9dee4", "#323a45"),
    "accent": ("#1d5bbf", "#7db0ff"),
    "mark": ("#fdeab0", "#4d3f12"),
}
# Of models, the reference first. Told apart by people who see fewer colours too, and each has a marker of its own.
SERIES = (
    ("#434c57", "#bcc5cf"),
    ("#1f62c4", "#6ea8fe"),
    ("#bf5509", "#f2994a"),
    ("#177a3c", "#4cc38a"),
    ("#7a3ae0", "#b794f6"),
    ("#b81b5b", "#f472b6"),
    ("#0e6f8c", "#3cc3d8"),
    ("#756600", "#d6c33c"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# From small to large: of errors, and of bits.
ERRORS = (
    ("#fdf4ea", "#2a1c14"),
    ("#fbe3c8", "#432513"),
    ("#f8cb9a", "#613212"),
    ("#f2ad69", "#834213"),
    ("#e78a3f", "#a65618"),
    ("#d1682a", "#c7702a"),
    ("#ae4a1e", "#e0914c"),
    ("#862f15", "#f0b67f"),
    ("#5c1a0c", "#fbdcbd"),
)
BITS = (
    ("#f0f4fa", "#1a2433"),
    ("#d9e6f5", "#1d3350"),
    ("#bdd5ee", "#21446f"),
    ("#98bfe4", "#285790"),
    ("#6fa5d8", "#3a6db0"),
    ("#4688c8", "#5687c9"),
    ("#286bb0", "#7aa4dc"),
    ("#154f8f", "#a3c3ec"),
    ("#0b356b", "#d3e3f8"),
)
_ROWS = {
    **INK,
    **{f"s{number}": pair for number, pair in enumerate(SERIES)},
    **{f"e{number}": pair for number, pair in enumerate(ERRORS)},
    **{f"b{number}": pair for number, pair in enumerate(BITS)},
}
VARIABLES = {light: f"var(--{name})" for name, (light, _) in _ROWS.items()}


def light(name: str) -> str:
    """A colour of INK as pictures are drawn."""
    return INK[name][0]


def series(number: int) -> str:
    """The colour of a model by its place."""
    return SERIES[number % len(SERIES)][0]


def marker(number: int) -> str:
    """Its marker."""
    return MARKERS[number % len(MARKERS)]


def css() -> str:
    """The variables of a page: light unless the reader, or else the reader's system, wants it dark."""
    bright, dark = (
        "".join(f"--{name}:{pair[place]};" for name, pair in _ROWS.items()) + f"color-scheme:{scheme}"
        for place, scheme in enumerate(("light", "dark"))
    )
    return (
        f":root{{{bright}}}\n"
        f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
        f":root:has(#theme-light:checked){{{bright}}}\n"
        f":root:has(#theme-dark:checked){{{dark}}}\n"
        f"@media print{{:root{{{bright}}}}}"
    )
