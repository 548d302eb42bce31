"""A container of checkpoints for tests: one file, a pickle-free zip of a JSON description and raw tensors."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcore.checkpoints.sink import Outline
from quantcore.checkpoints.source import Header
from quantcore.plugins import Container, hookimpl


@hookimpl
def quantcore_containers() -> Iterable[Container]:
    return [
        Container(".tiny", f"{__name__}:TinySource", f"{__name__}:TinySink"),
        Container(".readonly", f"{__name__}:TinySource"),
    ]


class TinySource:
    """Reads tensors whose bytes are members of the archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        content = json.loads(self._archive.read("content.json"))
        self.config: Mapping[str, Any] = content["config"]
        self.metadata: Mapping[str, str] = content["metadata"]
        self.side_files = {name: text.encode() for name, text in content["side_files"].items()}
        self.headers = {
            name: Header(path.name, getattr(torch, dtype), tuple(shape), 0)
            for name, (dtype, shape) in content["tensors"].items()
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            header, raw = self.headers[name], bytearray(self._archive.read(f"tensors/{name}"))
            yield name, torch.frombuffer(raw, dtype=header.dtype).view(header.shape)

    def close(self) -> None:
        self._archive.close()


class TinySink:
    """Writes the archive; its name comes when it is complete."""

    def __init__(self, path: Path, outline: Outline) -> None:
        self._archive = zipfile.ZipFile(path, "w")
        self._metadata = dict(outline.metadata)
        self._tensors: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        self._archive.writestr(f"tensors/{name}", tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def finish(self, config: Mapping[str, Any], side_files: Mapping[str, bytes]) -> None:
        content = {
            "config": dict(config),
            "metadata": self._metadata,
            "side_files": {name: text.decode() for name, text in side_files.items()},
            "tensors": self._tensors,
        }
        self._archive.writestr("content.json", json.dumps(content))
        self._archive.close()
