"""Schemes by the names that llm-compressor gives them, as compressed-tensors 0.20 defines them."""

from __future__ import annotations

from typing import Any

_INT8_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
_INT4_TOKEN = {"num_bits": 4, "strategy": "token", "dynamic": True}
_FP8_TOKEN = {**_INT8_TOKEN, "type": "float"}
_FP8_GROUP = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
_NVFP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}


def _int(bits: int, **changes: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": "group", "group_size": 128, **changes}


def _fp8(strategy: str, **changes: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, **changes}


def _mx(bits: int, **changes: Any) -> dict[str, Any]:
    scale = {"group_size": 32, "scale_dtype": "torch.uint8"}
    return {"num_bits": bits, "type": "float", "strategy": "group", **scale, **changes}


# A preset per row: its weights, and its input activations where it quantizes them.
PRESETS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "UNQUANTIZED": (None, None),
    **{f"W{bits}A16": (_int(bits), None) for bits in range(2, 9)},
    **{f"W{bits}A8": (_int(bits), _INT8_TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": (_int(bits), _INT4_TOKEN) for bits in range(2, 5)},
    "W4A16_ASYM": (_int(4, symmetric=False), None),
    "W8A8": ({"num_bits": 8, "strategy": "channel"}, _INT8_TOKEN),
    "INT8": ({"num_bits": 8, "strategy": "channel"}, _INT8_TOKEN),
    "W4AFP8": (_int(4), _FP8_TOKEN),
    "FP8": (_fp8("tensor"), _fp8("tensor", observer="static_minmax")),
    "FP8_DYNAMIC": (_fp8("channel"), _FP8_TOKEN),
    "FP8_BLOCK": (_fp8("block", block_structure=[128, 128]), _FP8_GROUP),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, {**_NVFP4, "dynamic": "local", "observer": "static_minmax"}),
    "MXFP4A16": (_mx(4), None),
    "MXFP4": (_mx(4), _mx(4, dynamic=True)),
    "MXFP4XFP8": (_mx(4), _FP8_GROUP),
    "MXFP6A16": (_mx(6), None),
    "MXFP6A8": (_mx(6), _mx(8, dynamic=True)),
    "MXFP8A16": (_mx(8), None),
    "MXFP8": (_mx(8), _mx(8, dynamic=True)),
}

# Presets that meant something else before a version: the version, and what they meant.
_FORMERLY = {"W8A16": ((0, 16), ({"num_bits": 8, "strategy": "channel"}, None))}


def preset(name: str, targets: list[str], version: str | None = None) -> dict[str, Any]:
    """The scheme of a preset, its name in any case, as a dict of config_groups.

    version: of the file that holds the name; None means the newest. Raises ValueError for an unknown name.
    """
    key = name.upper()
    if key not in PRESETS:
        raise ValueError(f"scheme {name!r:.40} is unknown; use one of {', '.join(PRESETS)}")
    weights, inputs = PRESETS[key]
    if key in _FORMERLY and version is not None and version_tuple(version) < _FORMERLY[key][0]:
        weights, inputs = _FORMERLY[key][1]
    return {"targets": list(targets), "weights": weights, "input_activations": inputs}


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to be compared: "0.9.4.1a2" -> (0, 9, 4, 1)."""
    numbers: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
