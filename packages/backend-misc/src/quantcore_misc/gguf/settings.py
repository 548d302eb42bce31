"""config.json of a file's metadata, and metadata of a config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from quantcore_misc.gguf import rope
from quantcore_misc.gguf.architectures import ARCHITECTURES, Architecture, Setting
from quantcore_misc.gguf.container import Contents
from quantcore_misc.gguf.metadata import Value

_LARGEST = 1 << 24  # of a size that a config.json is made of: no model has more
_ALIASES = {"num_experts": "num_local_experts"}  # as newer config.json call it
_TOKENS = "tokenizer.ggml.tokens"
_NUMBERS_OF_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def architecture_of(contents: Contents) -> Architecture:
    """The row of the table that a file is of. Raises ValueError listing those that are known."""
    name = contents.get("general.architecture")
    rows = [row for row in ARCHITECTURES if row.name == name]
    if not rows:
        known = ", ".join(dict.fromkeys(row.name for row in ARCHITECTURES))
        raise ValueError(f"general.architecture is {name!r:.60}, which is not known here; known are {known}")
    return next(row for row in rows if all(contents.get(f"{name}.{key}") for key in row.takes))


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """The row of the table for a config.json. Raises ValueError listing those that are known."""
    wanted = config.get("model_type")
    for row in ARCHITECTURES:
        if row.model_type == wanted:
            return row
    known = ", ".join(row.model_type for row in ARCHITECTURES)
    raise ValueError(f"model_type {wanted!r:.60} has no form in GGUF files here; known are {known}")


def read_config(
    contents: Contents, architecture: Architecture, tensor: Callable[[str], Tensor | None]
) -> dict[str, Any]:
    """The config.json of a file. tensor: gives one by its name in the file. Raises ValueError naming a key."""

    def get(key: str, default: Any) -> Any:
        return contents.get(f"{architecture.name}.{key}", default)

    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    for setting in architecture.settings:
        value = _read_setting(setting, get, architecture)
        if value is not None:
            config[setting.name] = value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    _check_heads(config)
    config["vocab_size"] = _vocabulary(contents, config.get("vocab_size"))
    config["tie_word_embeddings"] = "output.weight" not in contents.entries
    config["dtype"] = _float_dtype(contents)
    config["rope_parameters"] = rope.read_rope(get, tensor, rope.head_size(config), architecture.rope)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    config |= {key: name in contents.entries for key, name in biases.items() if architecture.model_type == "llama"}
    for key, name in _NUMBERS_OF_TOKENS.items():
        config[key] = contents.get(f"tokenizer.ggml.{name}_token_id")
    return {**config, **_constants(architecture, config)}


def write_config(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Value]:
    """The metadata of a config.json, less that of a tokenizer. Raises ValueError naming a key that is missing."""
    values = {"general.architecture": Value("string", architecture.name), "general.type": Value("string", "model")}
    for setting in architecture.settings:
        data = config.get(setting.name, config.get(_ALIASES.get(setting.name, "")))
        if data is None and setting.name == "head_dim":
            data = rope.head_size(config)
        if data is None and setting.default is ...:
            raise ValueError(f"config.json: {setting.name} is missing, which {architecture.name} needs")
        if data is not None:
            number = float(data) if setting.kind == "float32" else int(data)
            values[f"{architecture.name}.{setting.key}"] = Value(setting.kind, number)
    values[f"{architecture.name}.rope.dimension_count"] = Value("uint32", rope.head_size(config))
    return values


def _read_setting(setting: Setting, get: Callable[[str, Any], Any], architecture: Architecture) -> Any:
    value = get(setting.key, setting.default)
    if value is ...:
        raise ValueError(f"{architecture.name}.{setting.key} is missing, which the architecture needs")
    if value is None:
        return None
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]  # of every layer
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{architecture.name}.{setting.key} must be one number, got {value!r:.80}")
    if setting.kind == "uint32" and not 0 <= value <= _LARGEST:
        raise ValueError(f"{architecture.name}.{setting.key} is {value}, and no model has more than {_LARGEST}")
    return _shortest(value) if setting.kind == "float32" else int(value)


def _shortest(value: float) -> float:
    """The shortest decimal number that float32 rounds to this one: what a config.json said before."""
    return float(f"{value:.7g}")


def _check_heads(config: Mapping[str, Any]) -> None:
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    if not heads or not keys or heads % keys:
        raise ValueError(f"{heads} heads and {keys} heads of keys do not fit together")


def _vocabulary(contents: Contents, given: int | None) -> int:
    """Rows of the embedding, where there is one."""
    entry = contents.entries.get("token_embd.weight")
    found = given if entry is None else entry.shape[0]
    return len(contents.get(_TOKENS, ())) if found is None else found


def _float_dtype(contents: Contents) -> str:
    """The dtype of matrices that are not quantized; float32 where there are none."""
    kinds = (entry.kind.dtype for entry in contents.entries.values() if len(entry.shape) > 1 and entry.kind.dtype)
    return next((kind for kind in kinds if kind in ("bfloat16", "float16")), "float32")


def _constants(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """What files leave out. pattern: one layer in so many attends to everything, the others to a window."""
    found = dict(architecture.constants)
    pattern = found.pop("pattern", 0)
    if pattern:
        layers = range(1, config["num_hidden_layers"] + 1)
        found["layer_types"] = ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]
    if architecture.model_type.startswith("gemma"):
        large = config["num_hidden_layers"] in (46, 62)  # the models of 27 billion weights
        per_head = config["hidden_size"] // config["num_attention_heads"]
        found["query_pre_attn_scalar"] = per_head if large else rope.head_size(config)
    return found
