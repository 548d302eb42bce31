"""The methods gptq, awq and auto-round for quantcore: calibrated integer weights, 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return []
