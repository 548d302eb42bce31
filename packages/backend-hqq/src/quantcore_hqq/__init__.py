"""HQQ for quantcore: half-quadratic quantization in the layout of the upstream package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcore.plugins import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantcore.plugins import Backend


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    from quantcore_hqq import hqq

    return [hqq.BACKEND]
