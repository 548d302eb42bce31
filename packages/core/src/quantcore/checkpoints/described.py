"""What is wrong with the quantization that a checkpoint describes, told with the file and with who wrote it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantcore.checkpoints.files import BACKEND_KEY
from quantcore.checkpoints.read import CONFIG_FILES, CONFIG_KEYS
from quantcore.checkpoints.safetensors_folder import CONFIG_NAME
from quantcore.errors import QuantcoreError, UnknownMethodError, with_text


@contextlib.contextmanager
def told_with_place(path: Path, config_json: Mapping[str, Any]) -> Iterator[None]:
    """While the block reads how a checkpoint is quantized, an error of it names the file that says so.

    A method that nobody knows here is told with the distribution that wrote the checkpoint, where that left its name.
    """
    try:
        yield
    except (QuantcoreError, TypeError, ValueError) as error:
        place, text = _describing(path), str(error)
        told = text if str(path) in text else f"{place}: {text}"
        writer = config_json.get(BACKEND_KEY)
        if isinstance(error, UnknownMethodError) and isinstance(writer, str):
            told += f"\nThis checkpoint was written by {writer:.80}; install that"
        if told == text:
            raise
        raise with_text(error, told) from error


def _describing(path: Path) -> Path:
    """The file of a checkpoint that says how it is quantized; the path itself where no file of a known name does."""
    config = path / CONFIG_NAME
    if config.is_file() and any(f'"{key}"'.encode() in config.read_bytes() for key in CONFIG_KEYS):
        return config
    return next((path / name for name in CONFIG_FILES if (path / name).is_file()), path)
