"""The container that nearly every checkpoint is: a folder of safetensors files, with config.json and others beside."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcore.checkpoints.folder import FilesBeside, Folder, HeldFile, ReplacedError
from quantcore.checkpoints.safetensors_file import read_headers, read_tensors
from quantcore.checkpoints.shards import INDEX_NAME, SINGLE_NAME, ShardWriter
from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.source import Header
from quantcore.errors import CheckpointError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
CONFIG_NAME = "config.json"
_ATTEMPTS = 5  # to open a folder that is replaced again and again


class SafetensorsSource:
    """A `Source` over a folder. files: their names, whatever they are called; None: those that the folder has.

    Every file is opened at once and held: a folder that is replaced meanwhile is read as it was.
    """

    def __init__(self, folder: Folder, files: Sequence[str] | None = None) -> None:
        self.path = folder.path
        self.config = folder.read_json(CONFIG_NAME) if CONFIG_NAME in folder.names() else {}
        self.side_files: Mapping[str, bytes] = FilesBeside(folder, _is_no_side_file)
        self.headers: dict[str, Header] = {}
        self.metadata: dict[str, str] = {}
        self._folder = folder
        self._wanted = files
        self._files: dict[str, HeldFile] = {}
        listed = None if files is not None else _weight_map(folder)
        for name in files if files is not None else _file_names(folder, listed):
            self._files[name] = _held(folder, name, listed is not None)
            headers, metadata = read_headers(self._files[name])
            self.headers |= headers
            self.metadata |= metadata
        if listed is not None:
            _check_index(self.path / INDEX_NAME, listed, self.headers)

    @classmethod
    def opened(cls, path: Path, files: Sequence[str] | None = None) -> SafetensorsSource:
        """A source all of one version of a folder, tried again while another version takes its place.

        Raises ReplacedError when it is replaced faster than it can be opened.
        """
        for _ in range(_ATTEMPTS):
            folder = Folder(path)
            try:
                found = cls(folder, files)
            except (OSError, CheckpointError):
                if folder.is_current():
                    raise
                continue
            if folder.is_current():
                return found
        raise ReplacedError(f"{path}: is replaced again and again while it is read; load it when its writer is done")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[str, dict[str, Header]] = defaultdict(dict)
        for name in names:
            by_file[self.headers[name].file][name] = self.headers[name]
        for file, headers in by_file.items():
            yield from read_tensors(self._files[file], headers)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._folder.close()

    def __deepcopy__(self, memo: Any) -> SafetensorsSource:
        return self  # nothing of it changes, and a descriptor is not copied

    def __reduce__(self) -> Any:
        return SafetensorsSource.opened, (self.path, self._wanted)


class SafetensorsSink:
    """A `Sink` over a folder that exists and is empty."""

    def __init__(self, directory: Path, outline: Outline) -> None:
        self._directory = directory
        self._shards = ShardWriter(
            directory, outline.max_shard_size, outline.names, outline.metadata, outline.always_indexed, outline.tensors
        )

    def add(self, name: str, tensor: Tensor) -> None:
        self._shards.add(name, tensor)

    def finish(self, config: Mapping[str, Any], side_files: Mapping[str, bytes]) -> None:
        self._shards.finish()
        write_json(config, self._directory / CONFIG_NAME)
        for name, content in side_files.items():
            (self._directory / name).write_bytes(content)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object with sorted keys, indented by two."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_pickled(path: Path) -> CheckpointError:
    """The error for a checkpoint that is stored in a pickle."""
    return CheckpointError(
        f"{path.parent}: {path.name} is pickled, and loading a pickle can run any code; it is refused. "
        "Save the model as safetensors with the tool that wrote it, or use quantcore convert --from-pickle"
    )


def _is_no_side_file(name: str) -> bool:
    return name in (CONFIG_NAME, INDEX_NAME) or Path(name).match("*.safetensors") or _is_pickled(name)


def _is_pickled(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in PICKLED)


def _file_names(folder: Folder, weight_map: Mapping[str, str] | None) -> list[str]:
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    names = folder.names()
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    others = [name for name in names if name.endswith(".safetensors")]
    if len(others) == 1:
        return others
    pickled = [name for name in names if _is_pickled(name)]
    if pickled and not any(name.startswith("model") for name in others):
        raise refuse_pickled(folder.path / pickled[0])
    if others:
        raise CheckpointError(f"{folder.path}: {len(others)} safetensors files but no {INDEX_NAME}; restore the index")
    raise FileNotFoundError(f"{folder.path} holds no {SINGLE_NAME} and no {INDEX_NAME}; is this the right folder?")


def _weight_map(folder: Folder) -> dict[str, str] | None:
    """{tensor: file} of the index, None where a folder has none."""
    if INDEX_NAME not in folder.names():
        return None
    path = folder.path / INDEX_NAME
    weight_map = folder.read_json(INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    outside = [file for file in weight_map.values() if Path(file).name != file or file == ".."]
    if outside:
        raise CheckpointError(f"{path}: {outside[0]!r:.80} is not a plain file name; shards must lie beside the index")
    return weight_map


def _check_index(path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    lost = [name for name, file in weight_map.items() if name not in headers or headers[name].file != file]
    unlisted = [name for name in headers if name not in weight_map]
    faults = [f"{name}: not in {weight_map[name]} as the index says" for name in lost]
    faults += [f"{name}: in {headers[name].file} but not in the index" for name in unlisted]
    if faults:
        raise CheckpointError(f"{path}: index and shards disagree\n" + "\n".join(faults))


def _held(folder: Folder, name: str, is_listed: bool) -> HeldFile:
    try:
        return folder.open(name)
    except FileNotFoundError as error:
        lack = f"shard is missing though {INDEX_NAME} names it" if is_listed else "no such file"
        raise CheckpointError(f"{folder.path / name}: {lack}; download it again") from error
