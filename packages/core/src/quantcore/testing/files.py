"""Where a checkpoint that was saved keeps its tensors, however its method calls the files."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from quantcore.checkpoints.shards import INDEX_NAME


def weights_file(folder: Path) -> Path:
    """The only file of tensors in a folder; a method may have it named as a shard."""
    (file,) = folder.glob("*.safetensors")
    return file


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name."""
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - a handle is no mapping


def remove_weights(folder: Path) -> None:
    """Delete the only file of tensors in a folder, and its index."""
    weights_file(folder).unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
