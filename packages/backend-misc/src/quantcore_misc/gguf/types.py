"""The element types of GGUF files as a table: number, elements and bytes of a block, and the fields in it.

A row of a tensor is a whole number of blocks. Source: the GGUF specification and the block structures of ggml.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Field(NamedTuple):
    """Some numbers of one kind, one after the other in a block; wide ones are little-endian."""

    name: str
    length: int
    kind: str = "uint8"

    @property
    def nbytes(self) -> int:
        return self.length * FIELD_BYTES[self.kind]


class GgmlType(NamedTuple):
    """One element type. fields: in the order of their bytes; none for plain numbers, whose torch dtype is `dtype`."""

    number: int
    name: str
    elements: int
    nbytes: int
    fields: tuple[Field, ...] = ()
    dtype: str | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. Raises ValueError when the blocks do not divide it."""
        if columns % self.elements:
            raise ValueError(
                f"in_features {columns} is not a multiple of {self.elements}, the weights in a block of {self.name}; "
                f"use {' or '.join(_narrower(self.elements, columns))}"
            )
        return columns // self.elements * self.nbytes

    def row_elements(self, nbytes: int) -> int:
        """Weights of a row of so many bytes. Raises ValueError when they are not whole blocks."""
        if nbytes % self.nbytes:
            raise ValueError(f"rows of {nbytes} bytes are no whole blocks of {self.name}, {self.nbytes} bytes each")
        return nbytes // self.nbytes * self.elements

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.elements


FIELD_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "float16": 2, "uint32": 4}

_HALF = "float16"
_D, _M, _MIN = Field("d", 1, _HALF), Field("m", 1, _HALF), Field("dmin", 1, _HALF)


def _quants(count: int, kind: str = "uint8") -> Field:
    return Field("qs", count, kind)


def _row(number: int, name: str, elements: int, *fields: Field) -> GgmlType:
    return GgmlType(number, name, elements, sum(field.nbytes for field in fields), fields)


_PLAIN = (
    GgmlType(0, "F32", 1, 4, dtype="float32"),
    GgmlType(1, "F16", 1, 2, dtype="float16"),
    GgmlType(24, "I8", 1, 1, dtype="int8"),
    GgmlType(25, "I16", 1, 2, dtype="int16"),
    GgmlType(26, "I32", 1, 4, dtype="int32"),
    GgmlType(27, "I64", 1, 8, dtype="int64"),
    GgmlType(28, "F64", 1, 8, dtype="float64"),
    GgmlType(30, "BF16", 1, 2, dtype="bfloat16"),
)
_BLOCKS = (
    _row(2, "Q4_0", 32, _D, _quants(16)),
    _row(3, "Q4_1", 32, _D, _M, _quants(16)),
    _row(6, "Q5_0", 32, _D, Field("qh", 4), _quants(16)),
    _row(7, "Q5_1", 32, _D, _M, Field("qh", 4), _quants(16)),
    _row(8, "Q8_0", 32, _D, _quants(32, "int8")),
    _row(10, "Q2_K", 256, Field("scales", 16), _quants(64), _D, _MIN),
    _row(11, "Q3_K", 256, Field("qh", 32), _quants(64), Field("scales_l", 8), Field("scales_h", 4), _D),
    _row(12, "Q4_K", 256, _D, _MIN, Field("scales", 12), _quants(128)),
    _row(13, "Q5_K", 256, _D, _MIN, Field("scales", 12), Field("qh", 32), _quants(128)),
    _row(14, "Q6_K", 256, _quants(128), Field("qh", 64), Field("scales", 16, "int8"), _D),
    _row(16, "IQ2_XXS", 256, _D, _quants(16, "uint32")),
    _row(17, "IQ2_XS", 256, _D, _quants(32, "uint16"), Field("scales", 8)),
    _row(18, "IQ3_XXS", 256, _D, _quants(64), Field("signs", 8, "uint32")),
    _row(19, "IQ1_S", 256, _D, _quants(32), Field("qh", 8, "uint16")),
    _row(20, "IQ4_NL", 32, _D, _quants(16)),
    _row(21, "IQ3_S", 256, _D, _quants(64), Field("qh", 8), Field("signs", 32), Field("scales", 4)),
    _row(22, "IQ2_S", 256, _D, _quants(32), Field("signs", 32), Field("qh", 8), Field("scales", 8)),
    _row(23, "IQ4_XS", 256, _D, Field("scales_h", 1, "uint16"), Field("scales_l", 4), _quants(128)),
    _row(29, "IQ1_M", 256, _quants(32), Field("qh", 16), Field("scales", 4, "uint16")),
    _row(34, "TQ1_0", 256, _quants(48), Field("qh", 4), _D),
    _row(35, "TQ2_0", 256, _quants(64), _D),
    _row(39, "MXFP4", 32, Field("scales", 1), _quants(16)),
    _row(40, "NVFP4", 64, Field("scales", 4), _quants(32)),
    _row(41, "Q1_0", 128, _D, _quants(16)),
)
# What other numbers are, for errors: formats of activations, and types that llama.cpp has dropped.
ABSENT = {
    **dict.fromkeys((9, 15), "a format of activations, which no file holds"),
    **dict.fromkeys((4, 5, 31, 32, 33, 36, 37, 38), "a type that llama.cpp has dropped; convert the model anew"),
}

TYPES = {row.name: row for row in (*_PLAIN, *_BLOCKS)}
BLOCK_TYPES = {row.name: row for row in _BLOCKS}
_BY_NUMBER = {row.number: row for row in TYPES.values()}
_OF_DTYPE = {row.dtype: row for row in _PLAIN}


def type_of_number(number: int) -> GgmlType:
    """The type with a number of ggml's. Raises ValueError saying what the number is."""
    if number not in _BY_NUMBER:
        raise ValueError(
            f"type {number} is {ABSENT.get(number, 'none that is known here; is the file newer than this?')}"
        )
    return _BY_NUMBER[number]


def type_of_dtype(dtype: str) -> GgmlType:
    """The type of plain numbers of a torch dtype, by its name. Raises ValueError for one that files cannot hold."""
    if dtype not in _OF_DTYPE:
        raise ValueError(f"GGUF files hold no {dtype}; cast to one of {', '.join(map(str, _OF_DTYPE))}")
    return _OF_DTYPE[dtype]


def block_type(name: str) -> GgmlType:
    """The quantized type of a name. Raises ValueError listing the known ones."""
    if name not in BLOCK_TYPES:
        raise ValueError(f"type {name!r:.40} is none of {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]


def _narrower(elements: int, columns: int) -> list[str]:
    """Remedies for a row that blocks do not divide: types with smaller blocks that do, or floats."""
    sizes = {"Q5_0": 32, "Q8_0": 32}
    return [name for name, size in sizes.items() if size < elements and columns % size == 0] or ["F16"]


def tensor_bytes(kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, shape as torch has it. Raises ValueError when blocks do not divide its rows."""
    return kind.row_bytes(shape[-1] if shape else 1) * math.prod(shape[:-1])
