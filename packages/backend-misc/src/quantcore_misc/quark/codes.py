"""How Quark stores codes: of which integers words hold several, and how codes, scales and zero points lie."""

from __future__ import annotations

from typing import NamedTuple

from quantcore.sdk import Codes, Element, Float, Integer

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in a word, of the codes of eight neighbouring columns: "reorder"


class StoredInteger(NamedTuple):
    """An integer element, the dtype that stores it or a word of it, and the places of codes in words that hold several.

    places: None where each code has an element of its own.
    """

    element: Integer
    dtype: str
    places: tuple[int, ...] | None = None


INTEGERS = {
    "int2": StoredInteger(Integer(2), "int32"),
    "uint2": StoredInteger(Integer(2, is_signed=False), "uint8", (3, 2, 1, 0)),
    "int3": StoredInteger(Integer(3), "uint8", ()),
    "int4": StoredInteger(Integer(4), "int32", _PLACES),
    "uint4": StoredInteger(Integer(4, is_signed=False), "int32", _PLACES),
    "int8": StoredInteger(Integer(8), "int8"),
    "uint8": StoredInteger(Integer(8, is_signed=False), "uint8"),
}


def element_of(name: str) -> Element:
    """The element of a name of ours."""
    return INTEGERS[name].element if name in INTEGERS else Float(name)


def layout_of(name: str, strategy: str, is_reordered: bool) -> Codes:
    """How codes of an element lie. strategy: what shares a scale; integers of a "group" are stored transposed.

    is_reordered: the columns of every eight 4-bit codes are interleaved.
    """
    if name not in INTEGERS:
        element = Float(name)
        if element.bits == 8:
            return Codes(dtype=str(element.dtype).removeprefix("torch."))
        return Codes(dtype="uint8", packing="stream")
    stored, by_rows = INTEGERS[name], strategy != "group"
    if stored.places is None:
        return Codes(dtype=stored.dtype, transposed=not by_rows)
    order = () if stored.places == _PLACES and not is_reordered else stored.places
    return Codes("weight", stored.dtype, "stream", order, "k" if by_rows else "n", not by_rows)
