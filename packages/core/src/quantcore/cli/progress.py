"""A progress bar on stderr, and the observer that drives it while a model is quantized."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from quantcore.cli.output import Output
from quantcore.plugins import hookimpl
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from torch import Tensor

    from quantcore.formats.quantized_weight import QuantizedWeight

_SECONDS = 10.0  # between lines of progress
Update = Callable[[int, int, str], None]  # how much is done, of how much, and what was done last


@contextlib.contextmanager
def progress_bar(output: Output) -> Iterator[Update]:
    """A function that moves a bar, which shows from its first call to the end of the block.

    Where stderr is no terminal, a line now and then stands for the bar; under --quiet there is neither.
    """
    if not output.shows_progress:
        yield lambda done, total, label: None
        return
    if not sys.stderr.isatty():
        yield _Lines(output.note)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label, visible=True)


class _Lines:
    """Progress as lines, at most one in so many seconds, for logs."""

    def __init__(self, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._note, self._clock = note, clock
        self._start = self._last = clock()
        self._done = 0

    def __call__(self, done: int, total: int, label: str) -> None:
        now = self._clock()
        if done < self._done:  # the next of several pieces of work
            self._start = now
        self._done = done
        if now - self._last < _SECONDS or not 0 < done <= total:
            return
        self._last, spent = now, now - self._start
        left = f", about {_minutes(spent * (total - done) / done)} left" if done < total else ""
        self._note(f"{100 * done / total:.0f} % after {_minutes(spent)}{left}: {label}")


def _minutes(seconds: float) -> str:
    """ "0:07", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
