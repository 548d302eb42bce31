"""Log records on stderr, each text once."""

from __future__ import annotations

import logging

import click

from quantcore import settings


class _EchoHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {self.format(record)}"
        if text not in self._seen:  # a model is planned more than once on its way
            self._seen.add(text)
            click.echo(text, err=True)


def send_logs_to_stderr() -> None:
    """Show warnings on stderr, and with QUANTCORE_DEBUG what the library logs at INFO too."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _EchoHandler)]:
        root.removeHandler(handler)
    root.addHandler(_EchoHandler())
    if not settings.is_first_process():
        silence_logs()
    logging.getLogger("quantcore").setLevel(logging.INFO if settings.debug() else logging.WARNING)


def silence_logs() -> None:
    """Show errors only."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _EchoHandler):
            handler.setLevel(logging.ERROR)
