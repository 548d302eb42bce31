"""The methods gptq, awq and auto-round for quantcore: calibrated integer weights, 2 to 8 bits."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl
from quantcore_gptq import awq, gptq

# A method per row.
_METHODS = (awq, gptq)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [method.BACKEND for method in _METHODS]
