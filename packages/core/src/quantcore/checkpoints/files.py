"""The files beside the weights: config.json, and what a model needs besides to be used."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from quantcore import transformers_names as inside
from quantcore.checkpoints.folder import FilesBeside, Folder
from quantcore.checkpoints.read import CONFIG_KEYS
from quantcore.checkpoints.safetensors_folder import CONFIG_NAME, write_json as write_json
from quantcore.checkpoints.shards import INDEX_NAME
from quantcore.formats.base import dtype_name
from quantcore.plugins.known import KNOWN_METHODS, normalize_method
from quantcore.plugins.manager import plugins

# Tokenizers, generation settings, processors; the terms of use.
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_COMPANIONS = ("*.json", "merges.txt", "vocab.txt", "*.model", "*.jinja", *TERMS)
_NOT_COMPANIONS = (
    CONFIG_NAME,
    INDEX_NAME,
    "quantize_config.json",  # these three describe the quantization of the folder they lie in
    "quant_config.json",
    "quantization_config.json",
)
GENERATION_NAME = "generation_config.json"
BACKEND_KEY = "quantization_backend"  # of config.json: name and version of a distribution
_DTYPE_KEYS = ("dtype", "torch_dtype")


def companions(side_files: Mapping[str, bytes], besides: Collection[str] = ()) -> dict[str, bytes]:
    """Tokenizer, generation and processor files, and the terms of use, among the side files of a checkpoint.

    besides: names of files that a method writes for its layers; they describe the checkpoint that they lie in.
    """
    left_out = {*_NOT_COMPANIONS, *besides}
    return {
        name: side_files[name]
        for name in side_files
        if name not in left_out and any(fnmatch.fnmatchcase(name, pattern) for pattern in _COMPANIONS)
    }


def companions_of(folder: Path, besides: Collection[str] = ()) -> dict[str, bytes]:
    """The `companions` of a folder, which need not hold weights."""
    return companions(FilesBeside(Folder(folder), lambda name: False), besides)


def source_folder(model: Any) -> Path | None:
    """The folder that a model of transformers was loaded from; None for another model, or one from the hub."""
    name = getattr(getattr(model, "config", None), inside.NAME_OR_PATH, None)
    return Path(name) if isinstance(name, str) and name and Path(name, CONFIG_NAME).is_file() else None


def generation_config(model: Any) -> dict[str, bytes]:
    """The file with the generation settings of a model of transformers, which a program may have changed."""
    settings: Any = getattr(model, "generation_config", None)
    return {GENERATION_NAME: settings.to_json_string().encode()} if hasattr(settings, "to_json_string") else {}


def stored_dtype(config_json: Mapping[str, Any]) -> Any:
    """What a config.json says of the dtype of its float weights, None when it says nothing."""
    return next((config_json[key] for key in _DTYPE_KEYS if config_json.get(key) is not None), None)


def with_quantization(
    config_json: Mapping[str, Any],
    described: Mapping[str, Any],
    dtype: torch.dtype | None,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """A config.json with another description of its quantization and another dtype (None: its own).

    described: top-level entries, such as {"quantization_config": ...}; {} for float weights. without: keys that the
    method which config_json is of has besides the usual ones.
    """
    text = config_json.get("text_config")
    changed = {key: value for key, value in config_json.items() if key not in CONFIG_KEYS and key not in without}
    if isinstance(text, Mapping):
        changed["text_config"] = {key: value for key, value in text.items() if key not in CONFIG_KEYS}
    if dtype is not None:
        changed |= {key: dtype_name(dtype) for key in _DTYPE_KEYS if key in changed}
    changed.pop(BACKEND_KEY, None)
    return changed | dict(described) | written_by(described)


def written_by(described: Mapping[str, Any]) -> dict[str, str]:
    """The entry of config.json that names the distribution of a method which is not widely known, {} for others.

    described: as for `with_quantization`. Who lacks that distribution learns from it what to install.
    """
    config = described.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(method, str) or normalize_method(method) in KNOWN_METHODS:
        return {}
    owner = plugins().owner(method)
    return {} if owner is None else {BACKEND_KEY: owner}
