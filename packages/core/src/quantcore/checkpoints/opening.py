"""What a checkpoint is read from or written to: a folder of safetensors files, or a container of a backend."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantcore.checkpoints.safetensors_folder import SafetensorsSink, SafetensorsSource, refuse_pickled
from quantcore.checkpoints.sink import Outline, Sink
from quantcore.checkpoints.source import Source
from quantcore.checkpoints.write import atomic_directory, atomic_file, check_file_free, check_folder_free
from quantcore.plugins.manager import plugins

# Weights, configs and tokenizers; the terms of use and the model card.
_DOWNLOADED = (
    *("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "README.md"),
)


def open_source(path: str | os.PathLike[str]) -> Source:
    """The checkpoint in a folder, in a file of a container that a backend registers, or on the hub by its id.

    Raises FileNotFoundError when there is none, CheckpointError naming the file for a pickled, damaged or
    inconsistent one, and BackendNotInstalledError for a container whose backend is absent.
    """
    local = resolve(path)
    file = local if local.is_file() else _only_file(local)
    if file is None:
        return SafetensorsSource.opened(local)
    source: Source = _container(file, "source")(file)
    return source


def open_files(files: Sequence[Path]) -> Source:
    """The safetensors files that are given, of one folder, whatever they are called."""
    for file in files:
        if file.suffix != ".safetensors":
            raise refuse_pickled(file)
    return SafetensorsSource.opened(files[0].parent, [file.name for file in files])


@contextlib.contextmanager
def open_sink(target: str | os.PathLike[str], outline: Outline, overwrite: bool = False) -> Iterator[Sink]:
    """A sink for the container that the target's name asks for; it gets its name when the block ends well.

    Raises FileExistsError when the target exists and overwrite is false.
    """
    path = Path(target)
    if plugins().container(path.suffix) is None:
        with atomic_directory(path, overwrite) as directory:
            yield SafetensorsSink(directory, outline)
    else:
        make: Callable[[Path, Outline], Sink] = _container(path, "sink")
        with atomic_file(path, overwrite) as working:
            yield make(working, outline)


def check_target(target: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise what `open_sink` will raise for a target that is there already, before the work for it is done."""
    is_folder = plugins().container(Path(target).suffix) is None
    (check_folder_free if is_folder else check_file_free)(Path(target).resolve(), overwrite)


def resolve(path: str | os.PathLike[str]) -> Path:
    """The local folder or container file of a checkpoint; a hub id such as "org/name" is downloaded if it is neither.

    Raises FileNotFoundError when nothing of the kind exists.
    """
    check_exists(path)
    local = Path(path)
    return local if local.exists() else _download(os.fspath(path))


def check_exists(path: str | os.PathLike[str], takes_file: bool = False) -> None:
    """Raise FileNotFoundError for what is neither here nor of the form of a hub id; the hub is not asked.

    What lies in a folder that is here is a path, though it looks like an id. A file must be that of a container,
    unless any is taken.
    """
    if not os.fspath(path):
        raise FileNotFoundError("the path of the checkpoint is empty; give a folder, or a hub id such as 'org/name'")
    local = Path(path)
    if local.is_file() and not takes_file and plugins().container(local.suffix) is None:
        raise FileNotFoundError(f"{local} is a file; give the folder that holds config.json and the safetensors files")
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", os.fspath(path)) is not None and not local.parent.exists()
    if not local.exists() and not is_id:
        raise FileNotFoundError(
            f"{local} does not exist{_nearest(local)}; give a checkpoint folder or a hub id such as 'org/name'"
        )


def _container(file: Path, side: str) -> Any:
    """The function of a registered container that opens its source or its sink."""
    return plugins().resolve_container(file.suffix, side)


def _only_file(folder: Path) -> Path | None:
    """The file of a registered container that is all that a folder holds of weights; None where there is none."""
    names = [path for path in sorted(folder.iterdir()) if path.suffix]
    if any(path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") for path in names):
        return None
    found = [path for path in names if plugins().container(path.suffix) is not None and path.is_file()]
    return found[0] if len(found) == 1 else None


def _nearest(path: Path) -> str:
    """ "; did you mean X?" with an existing path whose names are like those of a path, or nothing when none is."""
    found = Path(path.anchor)
    for part in path.parts[len(found.parts) :]:
        try:
            names = [entry.name for entry in found.iterdir()]
        except OSError:
            return ""
        match = part if part in (*names, "..") else next(iter(difflib.get_close_matches(part, names, 1)), None)
        if match is None:
            return ""
        found /= match
    return f"; did you mean {found}?"


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"{repository} is no folder here{_nearest(Path(repository))}, and the hub does not give it; check the "
            f"name, the connection, and for a private one HF_TOKEN: {reason}"
        ) from error
