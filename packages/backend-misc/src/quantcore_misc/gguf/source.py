"""A GGUF file as a checkpoint that transformers would load: names, config, tokenizer, packed tensors."""

from __future__ import annotations

import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantcore.sdk import CheckpointError, Header
from quantcore_misc.gguf import rope, tokenizer
from quantcore_misc.gguf.architectures import EXPERT, Architecture, Row, Woven
from quantcore_misc.gguf.blocks import dequantize_rows
from quantcore_misc.gguf.changes import out_of_file, weave, woven_shape
from quantcore_misc.gguf.container import Contents, mapped_file, read_contents, tensor_in
from quantcore_misc.gguf.settings import architecture_of, read_config

_SUFFIXES = ("weight", "bias")


class Part(NamedTuple):
    """A tensor of the checkpoint: what it is in the file, and which matrix of a stack. is_float: of blocks, read so.

    woven: it is made of several tensors, of which `stored` is the first.
    """

    stored: str
    row: Row
    place: int | None = None
    is_float: bool = False
    woven: Woven | None = None


class GgufSource:
    """Reads a file, or all parts of a split one. Blocks stay packed; rows and norms come as folders have them.

    Raises CheckpointError naming the file for a damaged one, an architecture that is not known here, a setting that is
    missing, or tensors that the architecture does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents = read_contents(path)
        self._maps: dict[Path, mmap.mmap] = {}
        try:
            self._architecture = architecture_of(self._contents)
            self._parts = _parts(self._contents, self._architecture)
            self.headers: Mapping[str, Header] = {name: self._header(part) for name, part in self._parts.items()}
            self.config: Mapping[str, Any] = self._config()
        except (ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def metadata(self) -> Mapping[str, str]:
        """None: what a file says of itself is in `config` and `side_files`."""
        return {}

    @cached_property
    def side_files(self) -> Mapping[str, bytes]:
        """Tokenizer and generation settings, made of the file's metadata when they are asked for."""
        return _LazyFiles(tokenizer.files(self._contents, self.path))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """As the protocol says; of a stack of experts, the one that is asked for."""
        entries = self._contents.entries
        for name in sorted(names, key=lambda each: self.headers[each].offset):
            part = self._parts[name]
            if part.woven is not None:
                yield name, weave([self._plain(each) for each in part.woven.stored], part.woven.turned)
                continue
            mapped = self._mapped(entries[part.stored].file)
            tensor = tensor_in(mapped, part.stored, entries[part.stored], self._contents.is_swapped, part.place)
            if part.is_float:
                tensor = dequantize_rows(tensor, entries[part.stored].kind.name)
            yield name, out_of_file(tensor, part.row.change, self.config)

    def close(self) -> None:
        for mapped in self._maps.values():
            mapped.close()
        self._maps.clear()

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            self._maps[file] = mapped_file(file)
        return self._maps[file]

    def _header(self, part: Part) -> Header:
        entry = self._contents.entries[part.stored]
        shape = entry.stored_shape
        if part.woven is not None:
            shape = woven_shape(shape, len(part.woven.stored), part.woven.turned)
            return Header(entry.file.name, entry.stored_dtype, shape, entry.offset)
        if part.is_float:
            return Header(entry.file.name, torch.float32, entry.shape, entry.offset)
        if part.place is None:
            return Header(entry.file.name, entry.stored_dtype, shape, entry.offset)
        offset = entry.offset + part.place * entry.nbytes // shape[0]
        return Header(entry.file.name, entry.stored_dtype, shape[1:], offset)

    def _config(self) -> dict[str, Any]:
        config = read_config(self._contents, self._architecture, self._rope_tensor)
        types = self._types()
        if not types:
            return config
        usual = Counter(kind for name, kind in types.items() if "layers." in name) or Counter(types.values())
        base = usual.most_common(1)[0][0]
        others = {name: kind for name, kind in types.items() if kind != base or "layers." not in name}
        return {**config, "quantization_config": {"quant_method": "gguf", "type": base, "types": others or None}}

    def _types(self) -> dict[str, str]:
        """The block type of each module that has one."""
        packed = {name: part for name, part in self._parts.items() if not part.is_float}
        kinds = {name: self._contents.entries[part.stored].kind for name, part in packed.items()}
        return {name.removesuffix(".weight"): kind.name for name, kind in kinds.items() if kind.fields}

    def _rope_tensor(self, name: str) -> Tensor | None:
        return self._plain(name) if name in self._contents.entries else None

    def _plain(self, name: str) -> Tensor:
        entry = self._contents.entries[name]
        return tensor_in(self._mapped(entry.file), name, entry, self._contents.is_swapped)


class _LazyFiles(Mapping[str, bytes]):
    """Files by name, each made when it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> bytes:
        return (json.dumps(self._makers[name](), ensure_ascii=False, indent=1) + "\n").encode()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _parts(contents: Contents, architecture: Architecture) -> dict[str, Part]:
    """The tensors of a checkpoint by name. Raises ValueError listing those of the file that have no place."""
    found: dict[str, Part] = {}
    strangers = []
    for stored, entry in contents.entries.items():
        if stored in rope.TENSORS:
            continue
        woven = architecture.woven_of_stored(stored) if entry.kind.dtype is not None else None
        if woven is not None and _are_alike(contents, woven):
            found[woven.name] = Part(woven.stored[0], Row(stored, woven.name), woven=woven)
            continue
        base, _, suffix = stored.rpartition(".")
        place = architecture.row_of_stored(base) if suffix in _SUFFIXES else None
        if place is None:
            strangers.append(stored)
            continue
        row, numbers = place
        if EXPERT not in row.name:
            is_float = architecture.scales_embedding and base == "token_embd" and entry.kind.dtype is None
            found[f"{row.name.format(**numbers)}.{suffix}"] = Part(stored, row, is_float=is_float)
        elif len(entry.shape) < 2:
            strangers.append(stored)
        else:
            name = partial(row.name.format, **numbers)
            for index in range(entry.shape[0]):
                found[f"{name(expert=index)}.{suffix}"] = Part(stored, row, index)
    if strangers:
        listed = ", ".join(map(repr, strangers[:10]))
        raise ValueError(
            f"{len(strangers)} tensors are none of a {architecture.class_name}: {listed:.600}; is it of a variant?"
        )
    return found


def _are_alike(contents: Contents, woven: Woven) -> bool:
    """Whether all tensors of a woven one are there, with one type and one shape."""
    entries = [contents.entries.get(name) for name in woven.stored]
    return None not in entries and len({(entry.kind.name, entry.shape) for entry in entries if entry is not None}) == 1
