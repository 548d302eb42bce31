"""The descriptor with which a plugin offers one container of checkpoints besides folders of safetensors files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Container:
    """A kind of file that holds a whole checkpoint.

    Published by an entry point of the group quantcore.containers whose name is the suffix without its dot ("gguf").
    suffix: of its files, with the dot, in lower case. source: "module:function" that opens a path as a
    `quantcore.checkpoints.source.Source`. sink: "module:function" that gives the `quantcore.checkpoints.sink.Sink` for
    a path to write and an `Outline`; "" where it cannot be written.
    """

    suffix: str
    source: str
    sink: str = ""
