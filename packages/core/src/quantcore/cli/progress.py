"""A progress bar on stderr, and the observer that drives it while a model is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from quantcore.cli.output import Output
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from quantcore.formats.base import QuantizedWeight

Update = Callable[[int, int, str], None]  # how much is done, of how much, and what was done last


@contextlib.contextmanager
def progress_bar(output: Output) -> Iterator[Update]:
    """A function that moves a bar, which shows from its first call to the end of the block, where a bar is wanted."""
    if not output.shows_progress:
        yield lambda done, total, label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label, visible=True)


@contextlib.contextmanager
def quantizing_bar(total_weights: int, output: Output) -> Iterator[None]:
    """While the block quantizes a model, a bar that moves with each finished weight."""
    with progress_bar(output) as update:
        observer = _Observer(update, total_weights)
        plugins().register(observer)
        try:
            yield
        finally:
            plugins().unregister(observer)


class _Observer:
    def __init__(self, update: Update, total: int) -> None:
        self._update, self._total, self._done = update, total, 0

    @hookimpl
    def quantcore_weight_quantized(self, name: str, before: Tensor, after: QuantizedWeight) -> None:
        self._done += before.numel()
        self._update(self._done, self._total, name)
