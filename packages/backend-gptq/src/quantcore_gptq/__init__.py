"""The methods gptq, awq and auto-round for quantcore: calibrated integer weights, 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantcore.sdk import Backend, hookimpl
from quantcore_gptq import auto_round, awq, gptq

# A method per row.
_METHODS = (auto_round, awq, gptq)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [method.BACKEND for method in _METHODS]


@hookimpl
def quantcore_match_config(config_dict: Mapping[str, Any]) -> str | None:
    """The method of a config dict that names none, where a method here knows it for its own."""
    matchers = (getattr(method, "quantcore_match_config", None) for method in _METHODS)
    return next((found for match in matchers if match and (found := match(config_dict))), None)
