"""The descriptor with which a plugin offers one method."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

API_VERSION = 1  # raised when a hook or a contract changes so that an older backend would misbehave


@dataclass(frozen=True)
class Backend:
    """One method of an installed distribution. Classes are named, not imported, so that a plugin's import stays cheap.

    method: the name under which config.json knows it.
    config: "module:Class" of its QuantizationConfigMixin.
    quantizer: "module:Class" of its HfQuantizer, or "module:function" that maps a config to such a class.
    kernels: "module:function" strings; each function returns an iterable of kernels.
    example_configs: config dicts that the conformance suite runs; the first is the default of the demo.
    needs_calibration: whether quantizing from float weights needs data.
    solver: "module:function" that other methods may solve their layers with; see `quantcore.calibration.solvers`.
    upstream: "module:function" that gives the upstream package's own module for an nn.Linear and a config, for
    `quantcore bench --vs`; the package need not be installed.
    api: the API_VERSION that the plugin was written for.
    """

    method: str
    config: str
    quantizer: str
    summary: str = ""
    kernels: Sequence[str] = ()
    example_configs: Sequence[Mapping[str, Any]] = field(default=({},))
    needs_calibration: bool = False
    solver: str = ""
    upstream: str = ""
    api: int = API_VERSION


def import_string(target: str) -> Any:
    """The object that "module:attribute" names. Raises ImportError when module or attribute is absent."""
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ImportError(f"{target!r} is not of the form 'module:attribute'")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except AttributeError as error:
        raise ImportError(f"module {module_name!r} has no attribute {attribute!r}") from error
