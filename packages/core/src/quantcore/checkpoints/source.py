"""What a checkpoint is read from: a protocol, which a folder of safetensors files and every other container fulfils."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Header:
    """What a container says of one tensor before its bytes are read. offset: of the first byte in the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """A tensor of this dtype and shape on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Source(Protocol):
    """A checkpoint that is open for reading. What was opened is held: one that is replaced meanwhile is not read.

    Names, values and `config` are as in a folder that transformers loads, whatever the container calls and orders them.
    Opening one reads headers and no tensor, and raises FileNotFoundError when there is none, CheckpointError naming
    the file for one that is damaged.
    """

    @property
    def path(self) -> Path:
        """The folder or file, for messages and for tools that open it themselves."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Every tensor by name, in the order in which `read` is fastest."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the files say of themselves, such as `__metadata__` of safetensors; of several files, all of it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json, {} when there is none."""

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The other files by name, such as those of a tokenizer; each is read when it is asked for."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for some names, in the container's order; each tensor is on the CPU and owns its memory.

        Raises CheckpointError when a file changed since its headers were read.
        """

    def close(self) -> None:
        """Let go of what is open; nothing is read afterwards. Called once more it does nothing."""
