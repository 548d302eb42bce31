"""Rotary embeddings: between `rope_parameters` of config.json, and the keys and tensors of files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantcore_misc.gguf.metadata import Value

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FACTORS, LONG, SHORT)
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192  # of Llama 3: what files with factors leave out
_TOLERANCE = 1e-3  # of factors, which files round to float32

Get = Callable[[str, Any], Any]


def read_rope(get: Get, tensor: Callable[[str], Tensor | None], head_dim: int, kind: str) -> dict[str, Any]:
    """`rope_parameters` for the keys that get finds, less the architecture, and for tensors of factors.

    Raises ValueError for a scaling that is not known, or factors that no rule gives.
    """
    theta = float(get("rope.freq_base", 10000.0))
    found: dict[str, Any] = {"rope_theta": theta, **_scaling(get)}
    factors = tensor(FACTORS)
    if factors is not None:
        found |= _llama3(factors, theta, head_dim)
    long, short = tensor(LONG), tensor(SHORT)
    if long is not None and short is not None:
        found |= {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        attention = get("rope.scaling.attn_factor", None)
        found |= {} if attention is None else {"attention_factor": float(attention)}
    if kind == "untruncated" and found["rope_type"] == "yarn":
        return {**found, "truncate": False}
    if kind != "two":
        return found
    local = float(get("rope.freq_base_swa", 10000.0))
    return {"full_attention": found, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def write_rope(config: Mapping[str, Any], prefix: str) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Keys and float32 tensors for the `rope_parameters` of a config.json, or for what older ones have instead.

    Raises ValueError for a kind of scaling that files cannot say.
    """
    parameters = rope_parameters(config)
    full = parameters.get("full_attention", parameters)
    found = {"rope.freq_base": Value("float32", float(full.get("rope_theta", 10000.0)))}
    if "sliding_attention" in parameters:
        local = float(parameters["sliding_attention"].get("rope_theta", 10000.0))
        found["rope.freq_base_swa"] = Value("float32", local)
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind not in _WRITERS:
        raise ValueError(f"rope_type {kind!r:.40} has no form in GGUF files; known are {', '.join(_WRITERS)}")
    values, tensors = _WRITERS[kind](full, config)
    return {f"{prefix}.{key}": value for key, value in {**found, **values}.items()}, tensors


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, put together of the keys that older files of transformers have."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping):
        return dict(parameters)
    full = {"rope_theta": config.get("rope_theta") or 10000.0, **(config.get("rope_scaling") or {})}
    local = config.get("rope_local_base_freq")
    return full if local is None else {"full_attention": full, "sliding_attention": {"rope_theta": local}}


_Written = tuple[dict[str, Value], dict[str, Tensor]]


def _scaling(get: Get) -> dict[str, Any]:
    kind = get("rope.scaling.type", "none")
    if kind in ("none", "longrope"):
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type {kind!r:.40} is none of none, linear, yarn, longrope")
    found: dict[str, Any] = {"rope_type": kind, "factor": float(get("rope.scaling.factor", 1.0))}
    original = get("rope.scaling.original_context_length", None)
    if kind == "yarn" and original is not None:
        found["original_max_position_embeddings"] = int(original)
    return found


def _plain(full: Mapping[str, Any], config: Mapping[str, Any]) -> _Written:
    return {}, {}


def _scaled(full: Mapping[str, Any], config: Mapping[str, Any]) -> _Written:
    kind = full.get("rope_type") or full.get("type")
    found = {"rope.scaling.type": Value("string", kind), "rope.scaling.factor": Value("float32", float(full["factor"]))}
    original = full.get("original_max_position_embeddings")
    if original is not None:
        found["rope.scaling.original_context_length"] = Value("uint32", int(original))
    return found, {}


def _llama3_factors(full: Mapping[str, Any], config: Mapping[str, Any]) -> _Written:
    return {}, {FACTORS: llama3_factors(full, float(full.get("rope_theta", 10000.0)), head_size(config))}


def _long(full: Mapping[str, Any], config: Mapping[str, Any]) -> _Written:
    original = full.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    context = config.get("max_position_embeddings")
    if not original or not context:
        raise ValueError("longrope needs original_max_position_embeddings and max_position_embeddings")
    scale = context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    factor = full.get("attention_factor") or usual
    tensors = {
        name: torch.tensor(full[key], dtype=torch.float32)
        for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))
    }
    return {"rope.scaling.attn_factor": Value("float32", float(factor))}, tensors


_WRITERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], _Written]] = {
    "default": _plain,
    "linear": _scaled,
    "yarn": _scaled,
    "llama3": _llama3_factors,
    "longrope": _long,
    "su": _long,
}


def head_size(config: Mapping[str, Any]) -> int:
    """The size of a head: `head_dim`, or what hidden_size and the number of heads give."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def llama3_factors(full: Mapping[str, Any], theta: float, head_dim: int) -> Tensor:
    """What each rotary frequency is divided by, float32 [head_dim / 2].

    Long waves by `factor`, short ones by 1, those between by what lies between. Source: the announcement of Llama 3.1
    and its reference code.
    """
    factor, low, high = (float(full[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(full["original_max_position_embeddings"])
    waves = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((context / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _llama3(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters whose factors these are."""
    found = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _CONTEXT,
    }
    expected = llama3_factors(found, theta, head_dim)
    if expected.shape != factors.shape or not torch.allclose(expected, factors.float(), rtol=_TOLERANCE):
        raise ValueError(f"{FACTORS} holds other factors than those of Llama 3, which no rope_parameters say")
    return found
