"""Methods as the command line names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from quantcore.errors import UnknownMethodError
from quantcore.plugins import Backend
from quantcore.plugins.discovery import methods
from quantcore.plugins.manager import plugins


def chosen_backend(method: str, hint: str) -> Backend:
    """The backend of the method that the user named in the argument hint; an unknown name is a usage error.

    Raises what `Plugins.backend` raises for a known method whose backend is absent or does not load.
    """
    try:
        return plugins().backend(method)
    except UnknownMethodError as error:
        text = str(error).removeprefix("quant_method ")
        raise click.BadParameter(text, click.get_current_context(silent=True), param_hint=hint) from error


def installed_methods() -> str:
    """Names of the installed methods, for messages."""
    return ", ".join(info.method for info in methods() if info.installed) or "none; see quantcore list"


def brief_settings(config: Mapping[str, Any]) -> str:
    """A config in a few words: names and values, and of nested settings what tells one config from another."""
    words = [name if value is True else f"{name}={_brief(value)}" for name, value in config.items()]
    return " ".join(word.removeprefix("bnb_4bit_") for word in words)


def _brief(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    nested = [f"{key}:{_brief(inner)}" for key, inner in value.items() if isinstance(inner, Mapping)]
    shown = [str(value[key]) for key in ("type", "num_bits", "dtype", "group_size") if value.get(key)]
    return ",".join(nested or shown)
