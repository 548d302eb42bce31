"""Typed values of GGUF's metadata, and their bytes in either byte order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Number, name and struct code of each kind of value; a bool is a byte, a string a length and UTF-8.
_SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING, _ARRAY = 8, 9
_NAMES = {**{number: name for number, (name, _) in _SCALARS.items()}, _STRING: "string", _ARRAY: "array"}
_NUMBERS = {name: number for number, name in _NAMES.items()}
_DEPTH = 3  # of arrays in arrays; none are known in files
_LONGEST_KEY = 65535  # bytes, as the specification says


class Value(NamedTuple):
    """A value with its kind, such as "uint32"; of an array, also the kind of its elements."""

    kind: str
    data: Any
    element: str | None = None


def value_of(data: Any) -> Value:
    """A Python value with the kind that files usually give it. Raises TypeError for one that has none."""
    kinds = ((bool, "bool"), (int, "uint32" if isinstance(data, int) and data >= 0 else "int32"), (float, "float32"))
    found = next((kind for cls, kind in (*kinds, (str, "string")) if isinstance(data, cls)), None)
    if found is not None:
        return Value(found, data)
    if isinstance(data, list | tuple) and data:
        return Value("array", list(data), value_of(data[0]).kind)
    raise TypeError(f"metadata of GGUF holds no {type(data).__name__}: {data!r:.80}")


class Cursor:
    """Reads numbers and strings one after the other, and nothing past the end. Raises ValueError with the fault."""

    def __init__(self, buffer: memoryview, order: str) -> None:
        self._buffer, self._order, self.position = buffer, order, 0

    @property
    def left(self) -> int:
        """Bytes up to the end."""
        return len(self._buffer) - self.position

    def take(self, count: int, what: str) -> memoryview:
        """The next bytes."""
        if count > self.left:
            raise ValueError(f"{what} takes {count} bytes at {self.position}, where {self.left} are left")
        found = self._buffer[self.position : self.position + count]
        self.position += count
        return found

    def numbers(self, code: str, count: int, what: str) -> tuple[Any, ...]:
        """The next numbers of a struct code."""
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"{self._order}{count}{code}", self.take(size * count, what))

    def number(self, code: str, what: str) -> Any:
        return self.numbers(code, 1, what)[0]

    def count(self, what: str, least: int) -> int:
        """A count of things that take at least so many bytes each."""
        found = int(self.number("Q", what))
        if found * least > self.left:
            raise ValueError(f"{what} is {found}, more than fit in the {self.left} bytes that are left")
        return found

    def text(self, what: str, longest: int | None = None) -> str:
        """A string. longest: bytes; what is longer is refused, and what is no UTF-8 where this is given."""
        length = self.count(f"length of {what}", 1)
        if longest is not None and length > longest:
            raise ValueError(f"{what} has {length} bytes, more than the {longest} that a name may have")
        content = bytes(self.take(length, what))
        try:
            return content.decode("utf-8", "strict" if longest is not None else "surrogateescape")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8: {error}") from error

    def value(self) -> tuple[str, Value]:
        """A key and its value."""
        key = self.text("a key", _LONGEST_KEY)
        return key, self._value(key, self._kind(key), 0)

    def _kind(self, key: str) -> int:
        number = int(self.number("I", f"kind of {key!r:.80}"))
        if number not in _NAMES:
            raise ValueError(f"{key!r:.80} is of the kind {number}, and kinds end at {max(_NAMES)}")
        return number

    def _value(self, key: str, kind: int, depth: int) -> Value:
        what = f"value of {key!r:.80}"
        if kind in _SCALARS:
            name, code = _SCALARS[kind]
            return Value(name, self._scalars(code, 1, what)[0])
        if kind == _STRING:
            return Value("string", self.text(what))
        if depth == _DEPTH:
            raise ValueError(f"{what} is nested more than {_DEPTH} levels deep")
        element = self._kind(key)
        return Value("array", self._elements(key, element, what, depth), _NAMES[element])

    def _elements(self, key: str, element: int, what: str, depth: int) -> list[Any]:
        if element in _SCALARS:
            code = _SCALARS[element][1]
            return list(self._scalars(code, self.count(f"length of {what}", struct.calcsize(f"<{code}")), what))
        count = self.count(f"length of {what}", 8)
        if element == _STRING:
            return [self.text(what) for _ in range(count)]
        return [self._value(key, element, depth + 1) for _ in range(count)]

    def _scalars(self, code: str, count: int, what: str) -> tuple[Any, ...]:
        if code != "?":
            return self.numbers(code, count, what)
        found = self.numbers("B", count, what)
        if any(byte > 1 for byte in found):
            raise ValueError(f"{what} is a bool of {max(found)}; 0 and 1 are bools")
        return tuple(map(bool, found))


def write_values(values: Mapping[str, Value], order: str) -> bytes:
    """The bytes of keys and values. Raises ValueError naming the key for a number that its kind cannot hold."""
    parts = []
    for key, value in values.items():
        try:
            parts += [write_text(key, order), _write_kind(value.kind, order), _write_data(value, order)]
        except struct.error as error:
            raise ValueError(f"{key}: {value.data!r:.80} is no {value.element or value.kind}: {error}") from error
    return b"".join(parts)


def write_text(text: str, order: str) -> bytes:
    content = text.encode("utf-8", "surrogateescape")
    return struct.pack(f"{order}Q", len(content)) + content


def _write_kind(kind: str, order: str) -> bytes:
    return struct.pack(f"{order}I", _NUMBERS[kind])


def _write_data(value: Value, order: str) -> bytes:
    number = _NUMBERS[value.kind]
    if number == _STRING:
        return write_text(value.data, order)
    if number != _ARRAY:
        return struct.pack(f"{order}{_SCALARS[number][1]}", value.data)
    assert value.element is not None, "an array says what its elements are"
    head = _write_kind(value.element, order) + struct.pack(f"{order}Q", len(value.data))
    return head + _write_elements(_NUMBERS[value.element], value.data, order)


def _write_elements(element: int, data: Sequence[Any], order: str) -> bytes:
    if element in _SCALARS:
        return struct.pack(f"{order}{len(data)}{_SCALARS[element][1]}", *data)
    write: Callable[[Any], bytes] = (
        (lambda item: write_text(item, order)) if element == _STRING else (lambda item: _write_data(item, order))
    )
    return b"".join(map(write, data))
