"""A bound on what a config may ask for: no more tensors, and no larger ones, than the files beside it could hold.

A model is built before its weights are read, so a config.json of a few bytes could ask for petabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from quantcore.errors import CheckpointError

_WEIGHTS_PER_BYTE = 16  # half a bit a weight, which no method goes below
_SPARE_WEIGHTS = 1 << 27  # for buffers that are computed, and heads that a checkpoint does not hold
_TENSORS_PER_TENSOR = 64  # made while a layer is built, for one that is stored
_SPARE_TENSORS = 1 << 14
_BYTES_OF_ENTRY = 50  # of the header of a safetensors file, at least, for each tensor
_COUNTED = ("layer", "label", "expert", "stage", "depth")  # keys whose numbers become lists in a config
_SPARE_ENTRIES = 1 << 20  # of such a list; what is built by it is counted then

_FACTORIES = frozenset(
    getattr(torch, name)
    for name in ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "zeros")
)


@dataclass(frozen=True)
class Holdings:
    """The size of what a folder of safetensors files holds: their bytes, and at most how many tensors."""

    nbytes: int
    tensors: int

    @classmethod
    def of(cls, directory: Path) -> Holdings | None:
        """Those of a folder, from sizes alone; None where it has no such file."""
        files = [path for path in directory.glob("*.safetensors") if path.is_file()]
        sizes = [path.stat().st_size for path in files]
        headers = [int.from_bytes(_first_bytes(path), "little") for path in files]
        entries = sum(min(header, size) // _BYTES_OF_ENTRY + 1 for header, size in zip(headers, sizes, strict=True))
        return cls(sum(sizes), entries) if files else None


def check_counts(directory: Path, config: Mapping[str, Any], holdings: Holdings) -> None:
    """Raise CheckpointError where a config.json counts more layers, labels or experts than its files hold."""
    most = _SPARE_ENTRIES + holdings.tensors
    for key, number in _numbers(config):
        if any(word in key for word in _COUNTED) and number > most:
            raise CheckpointError(
                f"{directory / 'config.json'}: {key} {number} is more than the files beside it hold, which have "
                f"{holdings.nbytes} bytes; download config.json or the files again"
            )


class WithinHoldings(TorchFunctionMode):
    """A block, of this thread, in which no more may be made than files hold. Raises CheckpointError before it is.

    Every factory of torch is asked on the meta device first, where a tensor takes no memory.
    """

    def __init__(self, directory: Path, holdings: Holdings) -> None:
        super().__init__()
        self._directory = directory
        self._holdings = holdings
        self._weights = _SPARE_WEIGHTS + holdings.nbytes * _WEIGHTS_PER_BYTE
        self._tensors = _SPARE_TENSORS + holdings.tensors * _TENSORS_PER_TENSOR

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _FACTORIES:
            self._count(func(*args, **{**_without_memory(given), "device": "meta"}))
        return func(*args, **given)

    def _count(self, tensor: torch.Tensor) -> None:
        self._weights -= tensor.numel()
        self._tensors -= 1
        if self._weights < 0 or self._tensors < 0:
            raise CheckpointError(
                f"{self._directory / 'config.json'} asks for more than the files beside it hold, which have "
                f"{self._holdings.nbytes} bytes: at a tensor of shape {tuple(tensor.shape)}; download them again"
            )


def _without_memory(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("out", "pin_memory", "generator")}


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number of a config by its key, at any depth."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
