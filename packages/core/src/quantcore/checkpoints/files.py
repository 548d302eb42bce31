"""The files beside the weights: config.json, and what a model needs besides to be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantcore.checkpoints.read import CONFIG_KEYS
from quantcore.formats.base import dtype_name

# Tokenizers, generation settings, processors.
_COMPANIONS = ("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja")
_NOT_COMPANIONS = (
    "config.json",
    "model.safetensors.index.json",
    "quantize_config.json",  # these three describe the quantization of the folder they lie in
    "quant_config.json",
    "quantization_config.json",
)
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object with sorted keys, indented by two."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and processor files that target does not have yet."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.name not in _NOT_COMPANIONS and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def source_folder(model: Any) -> Path | None:
    """The folder that a model of transformers was loaded from; None for another model, or one from the hub."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name, "config.json").is_file() else None


def write_generation_config(model: Any, target: Path) -> None:
    """Write the generation settings of a model of transformers, which a program may have changed."""
    settings: Any = getattr(model, "generation_config", None)
    if hasattr(settings, "to_json_string"):
        (target / "generation_config.json").write_text(settings.to_json_string(), encoding="utf-8")


def stored_dtype(config_json: Mapping[str, Any]) -> Any:
    """What a config.json says of the dtype of its float weights, None when it says nothing."""
    return next((config_json[key] for key in _DTYPE_KEYS if config_json.get(key) is not None), None)


def with_quantization(
    config_json: Mapping[str, Any], quantization: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """A config.json with another quantization_config (None: without one) and another dtype (None: its own)."""
    text = config_json.get("text_config")
    changed = {key: value for key, value in config_json.items() if key not in CONFIG_KEYS}
    if isinstance(text, Mapping):
        changed["text_config"] = {key: value for key, value in text.items() if key not in CONFIG_KEYS}
    if dtype is not None:
        changed |= {key: dtype_name(dtype) for key in _DTYPE_KEYS if key in changed}
    return changed if quantization is None else changed | {"quantization_config": dict(quantization)}
