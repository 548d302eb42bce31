"""Old pickled checkpoints, rewritten as safetensors. The only place where a pickle is opened, and only when asked to.

torch's restricted unpickler builds tensors and plain containers, refuses all else, and runs no code of the file.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.checkpoints.files import copy_companions, with_quantization, write_json
from quantcore.checkpoints.read import PICKLED, read_config
from quantcore.checkpoints.shards import ShardWriter
from quantcore.checkpoints.write import atomic_directory, parse_size
from quantcore.errors import CheckpointError


def rewrite_pickled(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    quantization_config: Mapping[str, Any] | None = None,
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the tensors of pickled files (.bin, .pt, .pth, .ckpt) as safetensors under the same names.

    source: a folder, or one file. Nested dictionaries become dotted names; what is no tensor is left out.
    quantization_config: put into config.json, for tools that kept it elsewhere; None keeps config.json as it is.
    Memory: files of torch 1.6 and later are mapped, older ones read whole.
    Raises CheckpointError naming the file that holds anything but tensors and plain containers, or a tensor twice, and
    for target what `save` raises.
    """
    files = _files(Path(source))
    directory = files[0].parent
    with atomic_directory(target, overwrite) as folder:
        names: set[str] = set()
        shards = ShardWriter(folder, parse_size(max_shard_size), _names(files))
        for file in files:
            for name, tensor in _tensors(file, _load(file)):
                if name in names:
                    raise CheckpointError(f"{file}: {name} stands in another file too; remove the file that is older")
                names.add(name)
                shards.add(name, tensor)
        shards.finish()
        config_json = read_config(directory)
        if quantization_config is not None:
            config_json = with_quantization(config_json, quantization_config, None)
        write_json(config_json, folder / "config.json")
        copy_companions(directory, folder)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(path for pattern in PICKLED for path in source.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{source} holds no file of the kinds {', '.join(PICKLED)}")
    return found


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: is damaged, or holds more than tensors and plain containers, and is not opened further ({reason})"
        ) from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _names(files: list[Path]) -> Iterator[str]:
    for file in files:
        yield from (name for name, _ in _tensors(file, _load(file)))


def _tensors(file: Path, content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries under dotted names. "state_dict" around everything is left out of them."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    if not prefix and set(content) == {"state_dict"}:
        content = content["state_dict"]
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, Mapping):
            yield from _tensors(file, value, f"{name}.")
