"""Importance matrices: files of llama.cpp that say how large the inputs of each layer are, column by column.

There are two forms: GGUF files of the type "imatrix", with sums of squares and counts of tokens for each tensor, and
the binary form of 2024 (`.dat`), entries of sums over calls. Both are read, the first is written. Source of the forms:
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import CheckpointError, spellings
from quantcore_misc.gguf.architectures import EXPERT, Architecture
from quantcore_misc.gguf.container import MAGIC, read_contents, read_tensors, write_file
from quantcore_misc.gguf.metadata import Cursor, Value
from quantcore_misc.gguf.types import TYPES

_SUMS, _COUNTS, _KIND = ".in_sum2", ".counts", "imatrix"
_CHUNK = 512  # tokens, what llama-imatrix takes at a time unless told otherwise
_LEAST_ENTRY = 4 + 4 + 4  # bytes of the lengths and of the count of calls
_LONGEST_NAME = 1 << 12  # bytes
_LISTED = 5


class Measured(NamedTuple):
    """The inputs of a layer: the mean square of each column, float32 [K], over so many tokens; zeros over none."""

    mean: Tensor
    tokens: int


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Of each tensor, by its name in GGUF files, the mean square of each column of its input, float32 [K] or [E * K].

    Zeros where nothing was measured. Raises CheckpointError naming the file and what is wrong in it.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file; an importance matrix is what llama-imatrix, or save_imatrix, wrote"
        )
    try:
        with file.open("rb") as stream:
            is_gguf = stream.read(len(MAGIC)) == MAGIC
        found = dict(_of_gguf(file) if is_gguf else _of_entries(Cursor(memoryview(file.read_bytes()), "<")))
        _check(found)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: no importance matrix that can be read: {error}") from error
    return found


def write_imatrix(
    path: str | os.PathLike[str], architecture: Architecture, measured: Mapping[str, Measured], experts: int = 0
) -> None:
    """Write what was measured of the layers of a model, by the names of checkpoints, in the form of a GGUF file.

    experts: how many matrices a stack has; those that are not among the layers get zeros.
    Raises ValueError naming a layer that the architecture does not have.
    """
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for name, (mean, tokens) in measured.items():
        stored, expert = stored_name(architecture, name)
        matrices = 1 if expert is None else experts
        sums = means.setdefault(stored, torch.zeros(matrices, mean.numel()))
        sums[expert or 0] = mean.float().cpu() * tokens
        counts.setdefault(stored, torch.zeros(matrices, 1))[expert or 0] = tokens
    most = max((int(count.sum()) for count in counts.values()), default=0)
    values = {
        "general.type": Value("string", _KIND),
        "imatrix.datasets": Value("array", ["calibration data"], "string"),
        "imatrix.chunk_count": Value("uint32", -(-most // _CHUNK)),
        "imatrix.chunk_size": Value("uint32", _CHUNK),
    }
    tensors = {}
    for stored in sorted(means):
        tensors[stored + _SUMS] = TYPES["F32"], means[stored]
        tensors[stored + _COUNTS] = TYPES["F32"], counts[stored]
    write_file(path, values, tensors)


def stored_name(architecture: Architecture, name: str) -> tuple[str, int | None]:
    """The name of a layer's weight in GGUF files, and which matrix of a stack it is. Raises ValueError naming it."""
    for spelling in spellings(name):
        place = architecture.row_of_name(spelling)
        if place is not None:
            row, numbers = place
            expert = int(numbers["expert"]) if EXPERT in row.name else None
            return f"{row.stored.format(**numbers)}.weight", expert
    raise ValueError(f"{name}: no tensor of a {architecture.class_name} in GGUF files, which an imatrix names")


def importance_of(found: Mapping[str, Tensor], stored: str, expert: int | None, columns: int) -> Tensor | None:
    """The importance of the columns of a weight, float32 [columns]; None where the file says nothing of it.

    Raises ValueError where the file has another number of them.
    """
    values = found.get(stored)
    if values is None:
        return None
    matrices = values.numel() // columns
    if values.numel() % columns or (expert or 0) >= matrices or (expert is None and matrices > 1):
        raise ValueError(
            f"the imatrix has {values.numel()} values for {stored}, and the weight {columns} columns; is it of another "
            "model?"
        )
    own = values.view(matrices, columns)[expert or 0]
    return own if bool(own.any()) else None


def _of_gguf(file: Path) -> Iterator[tuple[str, Tensor]]:
    contents = read_contents(file)
    kind = contents.get("general.type")
    if kind != _KIND:
        raise ValueError(f"it is a GGUF file of the type {kind!r:.40}, not {_KIND!r}; is it the model?")
    sums = [name.removesuffix(_SUMS) for name in contents.entries if name.endswith(_SUMS)]
    lone = sorted(set(contents.entries) - {name + end for name in sums for end in (_SUMS, _COUNTS)})
    lone += [name + _COUNTS for name in sums if name + _COUNTS not in contents.entries]
    if lone:
        raise ValueError(f"sums and counts do not come in pairs: {', '.join(lone[:_LISTED])}")
    kinds = {entry.kind.name for entry in contents.entries.values()}
    if kinds - {"F32"}:
        raise ValueError(f"its tensors are {', '.join(sorted(kinds))}, not F32")
    tensors = dict(read_tensors(contents))
    for name in sums:
        total, count = tensors[name + _SUMS], tensors[name + _COUNTS].flatten()
        if count.numel() == 0 or total.numel() % count.numel():
            raise ValueError(
                f"{name}: {total.numel()} sums and {count.numel()} counts; each count is of a whole matrix"
            )
        _check({name + _COUNTS: count})
        yield name, (total.view(count.numel(), -1) / count.clamp(min=1)[:, None]).flatten()


def _of_entries(cursor: Cursor) -> Iterator[tuple[str, Tensor]]:
    """Entries of a name, the count of calls, and the sum over them of mean squares; then calls and data of all."""
    for number in range(_count(cursor, "number of entries", _LEAST_ENTRY)):
        what = f"entry {number}"
        name = bytes(cursor.take(_count(cursor, f"length of the name of {what}", 1, _LONGEST_NAME), f"name of {what}"))
        calls = int(cursor.number("i", f"calls of {what}"))
        if calls < 0:
            raise ValueError(f"{what} has {calls} calls")
        values = cursor.numbers("f", _count(cursor, f"number of values of {what}", 4), f"values of {what}")
        try:
            yield name.decode(), torch.tensor(values) / max(calls, 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"name of {what} is no UTF-8: {error}") from error
    if cursor.left:  # the first releases wrote no more
        cursor.number("i", "calls of all entries")
        if cursor.left:
            cursor.take(_count(cursor, "length of the name of the data", 1, least_count=0), "name of the data")
    if cursor.left:
        raise ValueError(f"{cursor.left} bytes come after its end")


def _count(cursor: Cursor, what: str, size: int, most: int = 1 << 31, least_count: int = 1) -> int:
    """A count of things of at least so many bytes each, which must fit in what is left."""
    found = int(cursor.number("i", what))
    if not least_count <= found <= min(most, cursor.left // size):
        raise ValueError(f"{what} is {found}, where {cursor.left} bytes are left")
    return found


def _check(found: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the tensors with values that are no mean squares, or where there are none."""
    if not found:
        raise ValueError("it has no entries")
    bad: Sequence[str] = [
        name for name, values in found.items() if not bool((values >= 0).all() & values.isfinite().all())
    ]
    if bad:
        raise ValueError(f"values below 0, infinite or NaN for {', '.join(bad[:_LISTED])}")
