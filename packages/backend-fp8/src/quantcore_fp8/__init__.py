"""The methods fp8, mxfp8 and fbgemm_fp8 for quantcore: 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return []
