"""Methods for quantcore that pack a grouped matrix of codes over its rows: hqq and sinq, a folder each."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, hookimpl
from quantcore_hqq import hqq, sinq

# A method per row.
_METHODS = (hqq, sinq)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [method.BACKEND for method in _METHODS]
