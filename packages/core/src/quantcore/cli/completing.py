"""What a shell offers for the values of flags and arguments: files, folders, methods."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from quantcore.plugins.discovery import methods


def folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders, which the shell lists itself."""
    return [CompletionItem(incomplete, type="dir")]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and folders, which the shell lists itself."""
    return [CompletionItem(incomplete, type="file")]


def installed(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The installed methods, by name alone: no plugin is imported."""
    return [
        CompletionItem(info.method, help=info.summary)
        for info in methods()
        if info.installed and info.method.startswith(incomplete)
    ]
