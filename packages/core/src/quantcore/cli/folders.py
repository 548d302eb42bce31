"""Which folder a verb may write."""

from __future__ import annotations

import os
from pathlib import Path


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
