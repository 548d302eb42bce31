"""A checkpoint folder: its config, the names and headers of its tensors, and the tensors one by one."""

from __future__ import annotations

import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.checkpoints.safetensors_file import Header, read_headers, read_tensors
from quantcore.errors import CheckpointError
from quantcore.formats.base import FLOAT_DTYPES

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # weights, configs and tokenizers
PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_PLAIN = frozenset(FLOAT_DTYPES.values())
_CONFIG_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second in files of 2024
_METADATA_BYTES = 4096  # tensors this small are read with the headers: formats describe themselves in them


class Checkpoint:
    """The tensors of a checkpoint folder. Headers are read on construction; tensors when asked for.

    Raises FileNotFoundError when there is no checkpoint, CheckpointError naming the file for a pickled, truncated or
    inconsistent one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.directory = resolve(path)
        files = _find_files(self.directory)
        self.headers: dict[str, Header] = {}
        for file in files:
            self.headers.update(_headers(self.directory, file))
        _check_index(self.directory, self.headers)

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Checkpoint:
        """The tensors of the given files of one folder, whatever they are called; errors as for a folder."""
        pickled = [file for file in files if file.suffix != ".safetensors"]
        if pickled:
            raise CheckpointError(_refusal(pickled[0].parent, pickled[0].name))
        checkpoint = cls.__new__(cls)
        checkpoint.directory = files[0].parent
        checkpoint.headers = {}
        for file in files:
            checkpoint.headers.update(_headers(file.parent, file.name))
        return checkpoint

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names: {name in the files: name in the result}; names not listed stay."""
        view = copy.copy(self)
        view.headers = {names.get(name, name): header for name, header in self.headers.items()}
        return view

    def by_module(self) -> dict[str, dict[str, Tensor]]:
        """Meta tensors grouped by the module that owns them: {module: {suffix: tensor}}.

        A dotted suffix cannot be told from a submodule by its name alone, so each tensor is listed under every prefix
        that could own it.
        """
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, header in self.headers.items():
            tensor = torch.empty(header.shape, dtype=header.dtype, device="meta")
            parts = name.split(".")
            for cut in range(1, len(parts)):
                groups[".".join(parts[:cut])][".".join(parts[cut:])] = tensor
        return groups

    def read_metadata(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that are small enough to describe a format, by name; one pass over the files."""
        return dict(self.stream(name for name in names if self.headers[name].nbytes <= _METADATA_BYTES))

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for the given names, or all, in file order; each tensor owns its memory.

        Raises CheckpointError when a file has become shorter since its headers were read.
        """
        by_file: dict[str, dict[str, Header]] = defaultdict(dict)
        for name in self.headers if names is None else names:
            by_file[self.headers[name].file][name] = self.headers[name]
        for file, headers in by_file.items():
            yield from read_tensors(self.directory / file, headers)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The local folder of a checkpoint; a hub id such as "org/name" is downloaded if it is no folder.

    Raises FileNotFoundError when neither exists.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise FileNotFoundError(
            f"{directory} is a file; give the folder that holds config.json and the safetensors files"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)):
        raise FileNotFoundError(f"{directory} does not exist; give a checkpoint folder or a hub id such as 'org/name'")
    return _download(os.fspath(path))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, {} when there is none. Raises CheckpointError when it is no JSON object.

    Where it says nothing of quantization, and a file beside it that older tools wrote does, that is filled in.
    """
    path = directory / "config.json"
    config = _read_json(path) if path.exists() else {}
    beside = quantization_beside(directory) if quantization_dict(config) is None else None
    return config if beside is None else {**config, "quantization_config": beside}


def quantization_beside(directory: Path) -> dict[str, Any] | None:
    """The quantization config that older tools wrote into a file of its own, None when there is none."""
    file = next((directory / name for name in _CONFIG_FILES if (directory / name).exists()), None)
    return None if file is None else _read_json(file)


def quantization_dict(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, looked for in its text part too; null counts as absent."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    key, found = next(
        ((key, part[key]) for key in CONFIG_KEYS for part in parts if part.get(key) is not None), ("", {})
    )
    if not isinstance(found, dict):
        raise TypeError(f"{key} must be a dict, got {type(found).__name__}: {found!r:.80}")
    return found if key else None


def is_plain(tensors: Iterable[Header | Tensor]) -> bool:
    """Whether tensors are all of the wide float dtypes, as those of a module without a quantized weight are."""
    return all(tensor.dtype in _PLAIN for tensor in tensors)


def by_owner(headers: Mapping[str, Header]) -> dict[str, dict[str, Header]]:
    """Tensors by the module that owns them: {module: {suffix: header}}, in the order of the files.

    No module has the name of a tensor: beside "fc.weight", the owner of "fc.weight.absmax" is "fc".
    """
    groups: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        owner = _owner(name, headers)
        groups.setdefault(owner, {})[name[len(owner) + 1 :] if owner else name] = header
    return groups


def _owner(name: str, names: Collection[str]) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in names:
            return ".".join(parts[: end - 1])
    return ".".join(parts[:-1])


def _find_files(directory: Path) -> list[str]:
    if (directory / INDEX_NAME).exists():
        return sorted(set(_weight_map(directory).values()))
    if (directory / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        raise CheckpointError(f"{directory}: {len(others)} safetensors files but no {INDEX_NAME}; restore the index")
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(_refusal(directory, pickled[0]))
    raise FileNotFoundError(f"{directory} holds no {SINGLE_NAME} and no {INDEX_NAME}; is this the right folder?")


def _refusal(directory: Path, file: str) -> str:
    return (
        f"{directory}: {file} is pickled, and loading a pickle can run any code; it is refused. "
        "Save the model as safetensors with the tool that wrote it, or use quantcore convert --from-pickle"
    )


def _weight_map(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    outside = [file for file in weight_map.values() if Path(file).name != file]
    if outside:
        raise CheckpointError(f"{path}: {outside[0]!r:.80} is not a plain file name; shards must lie beside the index")
    return weight_map


def _check_index(directory: Path, headers: Mapping[str, Header]) -> None:
    if not (directory / INDEX_NAME).exists():
        return
    weight_map = _weight_map(directory)
    lost = [name for name, file in weight_map.items() if name not in headers or headers[name].file != file]
    unlisted = [name for name in headers if name not in weight_map]
    faults = [f"{name}: not in {weight_map[name]} as the index says" for name in lost]
    faults += [f"{name}: in {headers[name].file} but not in the index" for name in unlisted]
    if faults:
        raise CheckpointError(f"{directory / INDEX_NAME}: index and shards disagree\n" + "\n".join(faults))


def _headers(directory: Path, file: str) -> dict[str, Header]:
    path = directory / file
    if not path.is_file():
        lack = f"shard is missing though {INDEX_NAME} names it" if (directory / INDEX_NAME).exists() else "no such file"
        raise CheckpointError(f"{path}: {lack}; download it again")
    return read_headers(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repository!r} is no local folder, not in the hub's cache, and cannot be downloaded; check the id, the "
            f"connection, and for a private one HF_TOKEN: {error}"
        ) from error
