"""What a verb reads and writes, and where it runs: checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click


def check_places(sources: Iterable[str], target: Path | None = None, force: bool = False, device: str = "cpu") -> None:
    """Raise for what is not here to be read, may not be written, or is no device: in this order, before any work.

    sources: folders or hub ids; the first is the input, which target must not hold. device: as given with --device.
    """
    from quantcore.checkpoints.opening import check_exists

    first, *others = sources
    try:
        for source in (first, *others):
            check_exists(source)
    except FileNotFoundError as error:
        if target is None or force or not (target / "config.json").is_file():
            raise
        raise FileNotFoundError(f"{error}. {target} holds a model: IN comes first, then OUT") from error
    if target is not None:
        check_target(target, first, force)
    check_device_flag(device)


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
