"""The plugin of a method that is sound but for its entry module, which imports torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch  # noqa: F401 - the fault

from quantcore.plugins import Backend, hookimpl


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [Backend("heavy-entry", "config_faults:HeavyEntryConfig", "config_faults:HeavyEntryQuantizer")]
