"""A checkpoint under the names of a model: its config, the names and headers of its tensors, and the tensors."""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from quantcore.checkpoints.folder import FilesBeside, Folder, json_object
from quantcore.checkpoints.opening import open_files, open_source, resolve as resolve
from quantcore.checkpoints.safetensors_folder import CONFIG_NAME
from quantcore.checkpoints.source import Header, Source
from quantcore.errors import CheckpointError
from quantcore.formats.base import FLOAT_DTYPES
from quantcore.plugins.manager import plugins

_PLAIN = frozenset(FLOAT_DTYPES.values())
CONFIG_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json")
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second in files of 2024
_METADATA_BYTES = 4096  # tensors this small are read with the headers: formats describe themselves in them


@dataclass(frozen=True)
class Derived:
    """Tensors that a source does not store as they are wanted, and how they are made of those that it stores.

    inputs: names of tensors. outputs: the headers of what `make` gives for them, by name.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, Header]
    make: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class Checkpoint:
    """The tensors of a source under names that may differ from those stored. Tensors are read when asked for.

    Raises what `open_source` raises.
    """

    def __init__(self, path: str | os.PathLike[str] | Source) -> None:
        if not isinstance(path, str | os.PathLike) and not hasattr(path, "headers"):
            kind = type(path).__name__
            raise TypeError(f"a checkpoint is named by its folder or hub id, not by {kind}: {path!r:.80}")
        self.source: Source = open_source(path) if isinstance(path, str | os.PathLike) else path
        self.headers: dict[str, Header] = dict(self.source.headers)
        self._stored = {name: name for name in self.headers}
        self._derived: dict[str, tuple[Derived, str]] = {}  # by name here, with the name that `make` gives

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Checkpoint:
        """The tensors of the given files of one folder, whatever they are called; errors as for a folder."""
        return cls(open_files(files))

    @property
    def directory(self) -> Path:
        """The folder or file, for messages."""
        return self.source.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the files say of themselves."""
        return self.source.metadata

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """The files beside the weights and config.json by name, each read when it is asked for."""
        return self.source.side_files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, {} when there is none; what stands elsewhere of quantization is filled in."""
        return with_found_quantization(self.directory, self.source.config, self.side_files, self.metadata)

    def stored_name(self, name: str) -> str:
        """What the source calls a tensor; the same name for what it does not hold, such as a head tied elsewhere."""
        return self._stored.get(name, name)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names: {name here: name in the result}; names not listed stay.

        Raises CheckpointError when two would have one name.
        """
        view = copy.copy(self)
        view.headers = {names.get(name, name): header for name, header in self.headers.items()}
        view._stored = {names.get(name, name): stored for name, stored in self._stored.items()}
        view._derived = {names.get(name, name): made for name, made in self._derived.items()}
        if len(view.headers) < len(self.headers):
            raise CheckpointError(
                f"{self.directory}: {len(self.headers)} tensors have {len(view.headers)} names in the model; "
                "the checkpoint is of two architectures at once"
            )
        return view

    def part(self, without: Collection[str], config: Mapping[str, Any]) -> Checkpoint:
        """The same tensors less some, with the config.json of a model that is a part of the one described."""
        view = copy.copy(self)
        view.headers = {name: header for name, header in self.headers.items() if name not in without}
        vars(view)["config"] = dict(config)  # in place of what is read once
        return view

    def with_derived(self, derived: Iterable[Derived]) -> Checkpoint:
        """The same tensors, but for those that others are made of: these stand in their place."""
        view = copy.copy(self)
        view.headers, view._derived = dict(self.headers), dict(self._derived)
        for each in derived:
            for name in each.inputs:
                del view.headers[name]
            stored = {self._stored[name]: name for name in each.inputs}
            made = Derived(tuple(stored), each.outputs, partial(_make, each, stored))
            view.headers |= each.outputs
            view._derived |= {name: (made, name) for name in each.outputs}
        return view

    def by_module(self) -> dict[str, dict[str, Tensor]]:
        """Meta tensors grouped by the module that owns them: {module: {suffix: tensor}}.

        A dotted suffix cannot be told from a submodule by its name alone, so each tensor is listed under every prefix
        that could own it.
        """
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, header in self.headers.items():
            tensor = header.empty()
            parts = name.split(".")
            for cut in range(1, len(parts)):
                groups[".".join(parts[:cut])][".".join(parts[cut:])] = tensor
        return groups

    def read_metadata(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the named tensors that are small enough to describe a format, by name; one pass over the files."""
        return dict(self.stream(name for name in names if self.headers[name].nbytes <= _METADATA_BYTES))

    def stream(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for the given names, or all, in the source's order, and then those that are derived.

        Each tensor owns its memory. Raises CheckpointError when a file has changed since its headers were read.
        """
        asked = list(self.headers if names is None else names)
        wanted = {self._stored[name]: name for name in asked if name not in self._derived}
        for stored, tensor in self.source.read(wanted):
            yield wanted[stored], tensor
            del tensor  # it may be given back before the next one is read
        yield from self._make(name for name in asked if name in self._derived)

    def _make(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named derived tensors; those that are made together are made once."""
        groups: dict[int, dict[str, str]] = defaultdict(dict)
        sources = {id(derived): derived for derived, _ in self._derived.values()}
        for name in names:
            derived, output = self._derived[name]
            groups[id(derived)][output] = name
        for key, outputs in groups.items():
            made = sources[key].make(dict(self.source.read(sources[key].inputs)))
            for output, name in outputs.items():
                yield name, _alone(made[output])
            del made


def _make(derived: Derived, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What derived gives for tensors under their names in the source. names: {there: as derived knows them}."""
    return derived.make({names[stored]: tensor for stored, tensor in tensors.items()})


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is a part of a larger one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a folder's config.json, {} when there is none; needs no weights.

    Where it says nothing of quantization, what stands elsewhere is filled in. Raises CheckpointError for what is no
    JSON object.
    """
    if not directory.is_dir():
        return Checkpoint(directory).config
    folder = Folder(directory)
    config = folder.read_json(CONFIG_NAME) if CONFIG_NAME in folder.names() else {}
    beside = FilesBeside(folder, lambda name: name == CONFIG_NAME)
    return with_found_quantization(directory, config, beside, {})


def with_found_quantization(
    path: Path, config: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """config.json with the quantization_config that it, a file beside it or a method's own mark asks for, if any."""
    try:
        given = quantization_dict(config)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    if given is not None and given.get("quant_method") is not None:
        return dict(config)
    marked = plugins().match_checkpoint(config_json=config, side_files=side_files, metadata=metadata)
    if marked is None and given is None:
        marked = _written_beside(path, side_files)
    if marked is None:
        return dict(config)
    return {**{key: value for key, value in config.items() if key not in CONFIG_KEYS}, "quantization_config": marked}


def quantization_beside(directory: Path) -> dict[str, Any] | None:
    """The quantization config of a folder whose config.json has none, None when nothing in it tells of one."""
    return quantization_dict(read_config(directory))


def quantization_dict(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a config.json, looked for in its text part too; null counts as absent."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    key, found = next(
        ((key, part[key]) for key in CONFIG_KEYS for part in parts if part.get(key) is not None), ("", {})
    )
    if not isinstance(found, dict):
        raise TypeError(f"{key} must be a dict, got {type(found).__name__}: {found!r:.80}")
    return found if key else None


def positions(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model reads at most, by its config.json or the text part of that; None where none is said."""
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, Mapping)]
    found = (part.get(key) for part in parts for key in ("max_position_embeddings", "n_positions"))
    return next((size for size in found if isinstance(size, int) and size > 0), None)


def is_plain(tensors: Iterable[Header | Tensor]) -> bool:
    """Whether tensors are all of the wide float dtypes, as those of a module without a quantized weight are."""
    return all(tensor.dtype in _PLAIN for tensor in tensors)


def _written_beside(path: Path, side_files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """The quantization config that older tools wrote into a file of its own, None when there is none."""
    name = next((name for name in CONFIG_FILES if name in side_files), None)
    return None if name is None else json_object(side_files[name], path / name)
