"""Old pickled checkpoints, rewritten as safetensors. The only place where a pickle is opened, and only when asked to.

torch's restricted unpickler builds tensors and plain containers, refuses all else, and runs no code of the file. Where
the config's method knows classes of its upstream, files that hold those are read by `pickled_classes`, as strictly.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.checkpoints.files import companions_of, with_quantization
from quantcore.checkpoints.opening import open_sink
from quantcore.checkpoints.pickled_classes import Pickled, StoredTensor, read_classes
from quantcore.checkpoints.read import quantization_dict, read_config
from quantcore.checkpoints.safetensors_folder import PICKLED
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.write import parse_size
from quantcore.errors import CheckpointError, QuantcoreError
from quantcore.plugins.backend import import_string
from quantcore.plugins.manager import plugins

Readers = Mapping[str, str]  # "module:function" by the prefix of names of classes, as `Backend.pickled` has it


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
    config_json = read_config(directory)
    if quantization_config is not None:
        config_json = with_quantization(config_json, {"quantization_config": dict(quantization_config)}, None)
    readers = _readers(config_json)
    outline = Outline(names=_names(files, readers), config=config_json, max_shard_size=parse_size(max_shard_size))
    with open_sink(target, outline, overwrite) as sink:
        names: set[str] = set()
        for file in files:
            for name, tensor in _tensors(file, _load(file, readers), readers):
                if name in names:
                    raise CheckpointError(f"{file}: {name} stands in another file too; remove the file that is older")
                names.add(name)
                sink.add(name, tensor)
        sink.finish(config_json, companions_of(directory))


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(path for pattern in PICKLED for path in source.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{source} holds no file of the kinds {', '.join(PICKLED)}")
    return found


def _readers(config_json: Mapping[str, Any]) -> Readers:
    """What the method of a config reads of its upstream's classes; {} without a config, or its backend."""
    try:
        method = (quantization_dict(config_json) or {}).get("quant_method")
        return plugins().backend(method).pickled if isinstance(method, str) else {}
    except (QuantcoreError, TypeError):  # what is wrong with a config is told when the model is loaded
        return {}


def _load(file: Path, readers: Readers) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if readers and _is_zip(file):
            try:
                return read_classes(file, readers)
            except ValueError as fault:
                raise CheckpointError(f"{file}: {fault}; it is not opened further") from error
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file}: is damaged, or holds more than tensors and plain containers, and is not opened further ({reason})"
        ) from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _names(files: list[Path], readers: Readers) -> Iterator[str]:
    for file in files:
        yield from (name for name, _ in _tensors(file, _load(file, readers), readers))


def _tensors(file: Path, content: Any, readers: Readers, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries under dotted names. "state_dict" around everything is left out of them."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: expected a dictionary of tensors, got {type(content).__name__}")
    if not prefix and set(content) == {"state_dict"}:
        content = content["state_dict"]
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value.detach()
        elif isinstance(value, StoredTensor):
            yield name, value.read()
        elif isinstance(value, Pickled):
            yield from _of_class(file, name, value, readers)
        elif isinstance(value, Mapping):
            yield from _tensors(file, value, readers, f"{name}.")


def _of_class(file: Path, name: str, value: Pickled, readers: Readers) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the method stores for an object of its upstream."""
    reader = next((target for prefix, target in readers.items() if str(value.kind).startswith(prefix)), "")
    try:
        yield from import_string(reader)(name, value).items()
    except (AttributeError, ImportError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: {name}: {value.kind} is not read: {error}") from error
