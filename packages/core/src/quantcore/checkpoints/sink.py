"""What a checkpoint is written to: a protocol, which a folder of safetensors files and other containers fulfil."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from quantcore.checkpoints.layers import StoredLayer


@dataclass(frozen=True)
class Outline:
    """What is known of a checkpoint before its first tensor comes.

    names: of the tensors to come, or more: they tell how much room a header takes. tensors: those to come, each once,
    where all are known; their dtypes and shapes are read alone, and files get the layout of the safetensors library.
    metadata: for the header of every
    file. config: config.json as it will be, but for what a method says of its layers when all are written. layers: the
    quantized ones. side_files: files of the input that go along, by name. max_shard_size: bytes of a file.
    always_indexed: whether a single file gets an index too, and is named as a shard.
    """

    names: Iterable[str] = ()
    tensors: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[StoredLayer] = ()
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    max_shard_size: int = 5 * 10**9
    always_indexed: bool = False


class Sink(Protocol):
    """A checkpoint that is being written. It gets its name when it is complete: see `quantcore.checkpoints.opening`."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of any device and strides; OSError naming the file when it cannot be written."""

    def finish(self, config: Mapping[str, Any], side_files: Mapping[str, bytes]) -> None:
        """Write what stands beside the tensors: config.json and further files by name."""
