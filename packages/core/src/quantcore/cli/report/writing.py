"""Reports as files."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import quantcore
from quantcore.cli.output import Output, in_bytes
from quantcore.cli.report.options import Wanted, chosen_picture
from quantcore.cli.report.page import Section, page
from quantcore.cli.report.pictures import Picture
from quantcore.cli.report.svg import drawing, save_png


def write_report(
    wanted: Wanted,
    output: Output,
    title: str,
    summary: str,
    facts: Sequence[tuple[str, str]],
    draw: Callable[[], Sequence[Picture]],
    arrange: Callable[[Sequence[Picture]], list[Section]],
) -> None:
    """Draw the pictures and write what is wanted; says on stderr what was made, and how large."""
    with drawing():
        pictures = draw()
        if wanted.html is not None:
            text = page(title, summary, [*facts, *_run_facts()], arrange(pictures), _footer())
            _replace(wanted.html, lambda path: path.write_text(text, encoding="utf-8"))
            output.note(f"wrote {wanted.html}, {in_bytes(wanted.html.stat().st_size)}")
        if wanted.png is not None:
            images = {picture.key: picture.image for picture in pictures if picture.image is not None}
            chosen = images[chosen_picture(wanted.picture, list(images))]
            _replace(wanted.png, lambda path: save_png(chosen, path))
            output.note(f"wrote {wanted.png}, {in_bytes(wanted.png.stat().st_size)}")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file first, so that an interrupted run leaves no half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _run_facts() -> list[tuple[str, str]]:
    return [("Machine", f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores")]


def _footer() -> str:
    return f"quantcore {quantcore.__version__}. Every figure is of this one run: quantcore {shlex.join(sys.argv[1:])}"
