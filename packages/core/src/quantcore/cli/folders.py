"""What a verb reads and writes, and where it runs: checked before any work is done."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import click

from quantcore.cli.output import in_bytes
from quantcore.errors import QuantcoreError, with_text


def check_places(
    sources: Iterable[str],
    target: str | None = None,
    force: bool = False,
    device: str = "cpu",
    takes_file: bool = False,
) -> None:
    """Raise for what is not here to be read, may not be written, or is no device: in this order, before any work.

    sources: folders or hub ids, or files where they are taken; the first is the input, which target must not hold.
    target: as given on the command line. device: as given with --device.
    """
    from quantcore.checkpoints.opening import check_exists

    first, *others = sources
    try:
        for source in (first, *others):
            check_exists(source, takes_file)
    except FileNotFoundError as error:
        if not target or force or not (Path(target) / "config.json").is_file():
            raise
        raise FileNotFoundError(f"{error}. {target} holds a model: IN comes first, then OUT") from error
    if target == "":
        raise click.UsageError("argument OUT is empty; name the folder to write")
    if target is not None:
        check_target(Path(target), first, force)
    check_device_flag(device)


def text_of(name: str, flag: str) -> str:
    """The text of a file that a flag names. Raises OSError or ValueError that names the flag, and what it takes."""
    from quantcore.calibration.data import read_text
    from quantcore.calibration.datasets import DATASETS

    try:
        return read_text(Path(name))
    except FileNotFoundError as error:
        known = ", ".join(DATASETS)
        raise FileNotFoundError(f"{flag} {name}: no such file, and no data set of that name; known: {known}") from error
    except OSError as error:
        raise type(error)(f"{flag} {name}: {error.strerror}; give a file of UTF-8 text") from error
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def check_folder_flag(path: str | None, flag: str) -> None:
    """Raise click.BadParameter for what stands where a flag wants a folder, which may be new."""
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise click.BadParameter(f"{path} is no folder; name one, or a new one", param_hint=flag)


def check_space(target: Path, needed: int) -> None:
    """Raise OSError, before any work is done, where the disk has no room for what is to be written."""
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"{target} takes {in_bytes(needed)}, and {parent} has {in_bytes(free)} left; "
            "make room there, or choose another folder"
        )


@contextlib.contextmanager
def told_in_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """A block whose errors name flags where they name the arguments behind them. flags: by argument."""
    named = re.compile(rf"(?<![-\w.'\"])({'|'.join(flags)})(=|(?![-\w]))")
    try:
        yield
    except (QuantcoreError, ValueError) as error:
        text = named.sub(lambda found: flags[found[1]] + " " * len(found[2]), str(error))
        if text == str(error):
            raise
        raise with_text(error, text) from error


def chosen_device(name: str) -> str:
    """The device that a --device names where one is enough; "auto" is a GPU if there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device_flag(name: str) -> None:
    """Raise click.BadParameter for a --device that is none, and ValueError for one that is not available here."""
    import torch

    from quantcore.checkpoints.devices import STRATEGIES, usable_device

    if name in STRATEGIES:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":  # nothing is computed there
        raise click.BadParameter(f"{name!r} is no device; write cpu, cuda:0 or auto", param_hint="--device")
    if device.type != "cuda" or torch.cuda.is_available():
        usable_device(name, setting="--device")
    else:
        raise ValueError(f"torch finds no GPU for --device {name}; see quantcore doctor")


def check_size(text: str) -> None:
    """Raise ValueError for a --max-shard-size that is no size: it is needed only after the work."""
    from quantcore.checkpoints.write import parse_size

    try:
        parse_size(text)
    except ValueError as error:
        raise ValueError(f"--max-shard-size: {error}") from error


def check_target(target: Path, source: str, force: bool) -> None:
    """Raise, before any work is done, when a result may not be written to target.

    A new one must lie in a folder that can be written. An existing folder needs force, and even then must be empty or
    hold a checkpoint, and not be or hold the source.
    """
    if not os.path.lexists(target):
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "cannot be written" if parent.is_dir() else "is no folder"
            raise ValueError(f"{target} cannot be made, for {parent} {reason}; choose another folder")
        return
    if not force:
        raise FileExistsError(f"{target} exists; choose another folder, or replace it with --force")
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target} is no folder; choose another, for --force replaces folders only")
    inside = Path(source).resolve()
    if target.resolve() in (inside, *inside.parents):
        raise ValueError(f"{target} is or holds the input {source}, which would be lost; choose another folder")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise FileExistsError(f"{target} holds files but no config.json: it is no checkpoint; choose another folder")
