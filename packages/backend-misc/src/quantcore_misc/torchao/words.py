"""The objects of torchao as config.json and the headers of files spell them, read and made without torchao.

An object is {"_type": class, "_version": number, "_data": fields}; a member of an enum {"_type": class, "_data": NAME},
or its value as a string; a dtype {"_type": "torch.dtype", "_data": name}. Source: torchao 0.18, core/config.py.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# Fields, in the order of their class, that older versions did not write.
_NESTED: dict[str, dict[str, Any]] = {
    "PerTensor": {},
    "PerRow": {"dim": -1},
    "PerToken": {},
    "PerAxis": {"axis": 0},
    "PerGroup": {},
    "PerBlock": {},
    "Float8MMConfig": {"emulate": False, "use_fast_accum": False, "pad_inner_dim": False},
}
MOST_COLUMNS = 1 << 24  # of a block, and rows


def described(kind: str, fields: Mapping[str, Any], version: int = 1) -> dict[str, Any]:
    """An object as config.json has it."""
    return {"_type": kind, "_version": version, "_data": dict(fields)}


def member(kind: str, name: str) -> dict[str, str]:
    """A member of an enum, or a dtype, as config.json has it."""
    return {"_type": kind, "_data": name}


def dtype_word(name: str) -> dict[str, str]:
    return member("torch.dtype", name)


def encode(value: Any) -> Any:
    """An object of torchao, and what is in it, as JSON values. Raises TypeError for what has no such form."""
    if isinstance(value, enum.Enum):
        return member(type(value).__name__, value.name)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return _encoded_object(value, {name: getattr(value, name) for name in names})
    if hasattr(value, "_fields") and hasattr(value, "_asdict"):
        return _encoded_object(value, value._asdict())
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if type(value).__name__ == "dtype" and str(value).startswith("torch."):
        return dtype_word(str(value).removeprefix("torch."))
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} {value!r:.60} cannot be written to config.json")


def _encoded_object(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: encode(item) for name, item in fields.items() if name != "version" and not name.startswith("_")}
    return described(type(value).__name__, kept, getattr(value, "version", 1))


def is_object(value: Any) -> bool:
    """Whether a JSON value is an object, an enum's member or a dtype."""
    return isinstance(value, Mapping) and "_type" in value and "_data" in value


def completed(value: Any) -> Any:
    """A JSON value with the objects in it as today's version writes them."""
    if isinstance(value, list):
        return [completed(item) for item in value]
    if not is_object(value) or value["_type"] not in _NESTED or not isinstance(value["_data"], Mapping):
        return value
    data = {**_NESTED[value["_type"]], **{key: completed(item) for key, item in value["_data"].items()}}
    return described(value["_type"], data, value.get("_version", 1))


def word(value: Any) -> str:
    """A member of an enum, or a dtype, by its name in small letters, however it is spelled; "" for none."""
    name = value["_data"] if is_object(value) else value
    return name.lower().removeprefix("torch.") if isinstance(name, str) else ""


class Granularity(NamedTuple):
    """Which rows and columns of a weight, or columns of an input, share a scale: (rows, columns), 0 for all."""

    kind: str
    rows: int
    columns: int

    @property
    def block(self) -> tuple[int, int]:
        return self.rows, self.columns


def granularity(value: Any, label: str) -> Granularity:
    """The granularity that a JSON value says. Raises ValueError naming label for another value."""
    kind = value.get("_type") if is_object(value) else None
    data = value["_data"] if kind is not None and isinstance(value["_data"], Mapping) else {}
    if kind == "PerTensor":
        return Granularity(kind, 0, 0)
    if kind in ("PerRow", "PerToken") and data.get("dim", -1) in (-1, 1):
        return Granularity("PerRow", 1, 0)
    if kind == "PerAxis" and data.get("axis", 0) == 0:
        return Granularity("PerRow", 1, 0)
    sizes = _sizes(kind, data)
    if sizes is not None and all(type(size) is int and 0 < size <= MOST_COLUMNS for size in sizes):
        return Granularity(str(kind), *sizes)
    raise ValueError(
        f"{label} must be PerTensor, PerRow, PerAxis of axis 0, PerGroup with a group_size, or PerBlock with a "
        f"block_size of two, got {value!r:.100}"
    )


def _sizes(kind: Any, data: Mapping[str, Any]) -> tuple[Any, Any] | None:
    if kind == "PerGroup":
        return 1, data.get("group_size")
    found = data.get("block_size") if kind == "PerBlock" else None
    return (found[0], found[1]) if isinstance(found, list) and len(found) == 2 else None


def unversioned(value: Any) -> Any:
    """A JSON value as headers of files have it: objects without their versions."""
    if isinstance(value, list):
        return [unversioned(item) for item in value]
    if not is_object(value):
        return value
    data = value["_data"]
    if isinstance(data, Mapping):
        data = {key: unversioned(item) for key, item in data.items()}
    return {"_type": value["_type"], "_data": data}


def objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """The objects among a JSON value and what is in it, outer ones first."""
    if isinstance(value, list):
        for item in value:
            yield from objects(item)
    elif is_object(value):
        yield value
        for item in value["_data"].values() if isinstance(value["_data"], Mapping) else ():
            yield from objects(item)
