"""The methods fp8, mxfp8 and fbgemm_fp8 for quantcore: 8-bit floats."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.sdk import Backend, hookimpl
from quantcore_fp8 import fbgemm_fp8, fp8, mxfp8

# A method per row.
_METHODS = (fp8, mxfp8, fbgemm_fp8)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [method.BACKEND for method in _METHODS]
