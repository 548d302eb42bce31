"""The method quanto: how quantcore finds its classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quantcore.sdk import Backend, Guide, hookimpl

_MODULE = "quantcore_misc.quanto"
MAP = "quanto_qmap.json"

BACKEND = Backend(
    method="quanto",
    config=f"{_MODULE}.config:QuantoConfig",
    quantizer=f"{_MODULE}.quantizer:QuantoQuantizer",
    summary="int8, float8, int4 and int2 of optimum-quanto, saved too, without data",
    example_configs=({"weights": "int4"}, {"weights": "int8"}, {"weights": "float8"}, {"weights": "int2"}),
    guide=Guide(
        purposes=("inference",),
        pros="int2 to int8 and float8 with one simple config, saved too.",
        cons="Plain rounding: at 2 and 4 bits hqq is better at the same size.",
        served_by={"optimum-quanto": "tested with optimum-quanto 0.2.7"},
    ),
)


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    return [BACKEND]


@hookimpl
def quantcore_match_checkpoint(
    config_json: Mapping[str, Any], side_files: Mapping[str, bytes], metadata: Mapping[str, str]
) -> dict[str, Any] | None:
    """optimum-quanto marks a folder by a file that lists the quantized modules, and by nothing in config.json."""
    if MAP not in side_files:
        return None
    listed = json.loads(side_files[MAP])
    first: Any = next(iter(listed.values()), {}) if isinstance(listed, dict) else {}
    weights = str(first.get("weights", "qint8")).removeprefix("q") if isinstance(first, dict) else "int8"
    return {"quant_method": BACKEND.method, "weights": "float8" if weights.startswith("float8") else weights}
