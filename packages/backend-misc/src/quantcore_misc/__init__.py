"""Further methods for quantcore, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl
from quantcore_misc import compressed_tensors, quark

# A method per row.
_METHODS = (compressed_tensors, quark)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [method.BACKEND for method in _METHODS]
