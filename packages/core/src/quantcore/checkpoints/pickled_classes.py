"""Pickles of torch that hold objects of another package's classes, read as descriptions: none of those is built.

A name in the pickle stands for a thing of a short list here, or for an empty class that is made for this one reading;
every other name is refused. What stands on the list builds numbers and descriptions, and changes nothing else.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    **{name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "bool")},
    **{name: getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8")},
    **{name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2")},
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Pickled:
    """An object of a class of another package: kind, its full name; args and state as the pickle gives them.

    Both are untrusted. Tensors in state are `StoredTensor`s.
    """

    kind = ""
    args: Any = ()

    def __new__(cls, *args: Any) -> Pickled:
        made = super().__new__(cls)
        made.args = args
        return made

    @property
    def state(self) -> dict[str, Any]:
        """What the object held, by name."""
        return {name: value for name, value in vars(self).items() if name != "args"}


class StoredTensor(NamedTuple):
    """A tensor that is still in its file."""

    file: Path
    record: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor, contiguous. Raises ValueError where the file does not hold so much."""
        with zipfile.ZipFile(self.file) as archive:
            held = bytearray(archive.read(self.record))
        numbers = (self.offset, *self.size, *self.stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(self.size) != len(self.stride):
            raise ValueError(f"{self.record}: a tensor of size {self.size} and stride {self.stride} cannot be")
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if math.prod(self.size) and (last + 1) * self.dtype.itemsize > len(held):
            raise ValueError(f"{self.record}: holds {len(held)} bytes, too few for a tensor of size {self.size}")
        if not math.prod(self.size):
            return torch.empty(self.size, dtype=self.dtype)
        flat = torch.frombuffer(held, dtype=self.dtype, count=len(held) // self.dtype.itemsize)
        return flat.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


class _Storage(NamedTuple):
    """What a pickle says of the bytes of a tensor; dtype: None where the tensor says it."""

    record: str
    dtype: torch.dtype | None


class _StorageType(NamedTuple):
    dtype: torch.dtype | None


class _Function(NamedTuple):
    """A function that a pickle may call. It has no attributes that a pickle could set."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def read_classes(file: Path, prefixes: Collection[str]) -> Any:
    """What a pickle of torch, in a zip file, holds; objects of classes under the prefixes as `Pickled`.

    Raises ValueError naming what is not read: any other class or function, and what is no such file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("it is compressed, which torch never does")
            names = {record.filename for record in records}
            root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
            if root is None:
                raise ValueError("it holds no pickle of torch")
            order = f"{root}byteorder"
            if order in names and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
            with archive.open(f"{root}data.pkl") as stream:
                return _Reader(stream, file, root, names, prefixes).load()
    except ValueError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(str(error)) from error
    except (AttributeError, EOFError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__} {error}") from error


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path, root: str, names: Collection[str], prefixes: Collection[str]) -> None:
        super().__init__(stream)
        self._file, self._root, self._names = file, root, names
        self._prefixes = tuple(prefixes)
        self._made: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _Function(self._tensor),
            "torch._utils._rebuild_tensor_v3": _Function(self._tensor_of_dtype),
            "torch._utils._rebuild_parameter": _Function(lambda tensor, *_: tensor),
            "torch._utils._rebuild_wrapper_subclass": _Function(_wrapped),
            "torch._tensor._rebuild_from_type_v2": _Function(_with_state),
            "torch.serialization._get_layout": _Function(str),
            "torch.device": _Function(lambda *of: ":".join(map(str, of))),
            "torch.Size": _Function(tuple),
            "torch.storage.UntypedStorage": _StorageType(None),
            **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
            **{f"torch.{name}": _StorageType(dtype) for name, dtype in _STORAGES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._made:
            if not full.startswith(self._prefixes):
                raise pickle.UnpicklingError(f"it holds {full:.120}, which is not read")
            self._made[full] = type("Named", (Pickled,), {"kind": full})
        return self._made[full]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, *_ = pid
        record = f"{self._root}data/{key}"
        if not isinstance(kind, _StorageType) or record not in self._names:
            raise pickle.UnpicklingError(f"it lacks the numbers {record:.120}")
        return _Storage(record, kind.dtype)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
        return self._tensor_of_dtype(storage, offset, size, stride, False, None, storage.dtype)

    def _tensor_of_dtype(
        self, storage: Any, offset: Any, size: Any, stride: Any, needs_grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> StoredTensor:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it holds a tensor without numbers")
        return StoredTensor(self._file, storage.record, dtype, offset, tuple(size), tuple(stride))


def _wrapped(kind: Any, dtype: Any, size: Any, *_: Any) -> Pickled:
    if not (isinstance(kind, type) and issubclass(kind, Pickled)):
        raise pickle.UnpicklingError("it holds a tensor of no known class")
    return kind(dtype, tuple(size))


def _with_state(make: Any, kind: Any, args: Any, state: Any) -> Any:
    if not isinstance(make, _Function):
        raise pickle.UnpicklingError("it holds a tensor that is made in another way")
    made = make(*args)
    if isinstance(made, Pickled) and isinstance(state, Mapping):
        vars(made).update({str(name): value for name, value in state.items()})
    return made
