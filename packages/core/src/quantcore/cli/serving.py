"""The flag --serve-with: whether a program that serves models takes what will be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantcore.plugins.backend import SERVERS
from quantcore.plugins.discovery import methods
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins
from quantcore.plugins.serving import check_served, renamed
from quantcore.quantization_config import QuantizationConfigMixin


def serving_option(function: Any) -> Any:
    """Adds the flag to a verb."""
    return click.option(
        "--serve-with",
        type=click.Choice(SERVERS),
        help="Write names that this program reads, and refuse settings that it does not take.",
    )(function)


def servable(config: QuantizationConfigMixin, server: str, target: Path | None) -> QuantizationConfigMixin:
    """The config by which files get the names that a server reads; what it does not take is a usage error.

    target: what will be written, None where nothing is.
    """
    backend = plugins().backend(normalize_method(config.quant_method))
    described = config.to_dict()
    names = renamed(backend.guide, described, server)
    if names:
        described |= names
        config = type(config).from_dict(described)  # type: ignore[assignment]
    installed = (plugins().backend(info.method) for info in methods() if info.installed)
    try:
        check_served(backend, described, server, installed)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--serve-with") from error
    suffix = backend.guide.file_suffix
    if target is not None and suffix and target.suffix.lower() != suffix:
        raise click.UsageError(f"argument OUT: {server} reads {suffix} files; write {target.with_suffix(suffix)}")
    return config
