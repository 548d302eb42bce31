"""What the config of a folder may not ask of transformers: to run code that is not installed here.

Such code comes as Python beside the weights (`auto_map`), as a class that is no model of transformers
(`architectures`), or as a kernel of the hub (`attn_implementation`). Nobody is asked whether to run it: it is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantcore import transformers_names as inside
from quantcore.errors import CheckpointError

logger = logging.getLogger(__name__)

_OWN_MODELS = "transformers.models."
_BUILD_IT = "build the model yourself and pass it as model="


def check_config(transformers: Any, directory: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a config.json asks for code that is not transformers' own.

    A folder whose `model_type` transformers has is read by transformers' class, whatever its auto_map says.
    """
    path = directory / "config.json"
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{path}: model_type must be a string, got {type(kind).__name__}: {kind!r:.80}")
    if config.get("auto_map") and kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: auto_map names Python of the folder for model_type {kind!r:.80}, and no code of a folder is "
            f"ever run; {_BUILD_IT}"
        )
    for key, name in _implementations(config):
        if "/" in name:
            raise CheckpointError(
                f"{path}: {key} {name!r:.80} names a kernel of the hub, and code from there is not run for a folder; "
                "take the key out"
            )


def model_class(transformers: Any, directory: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers' own models that `architectures` of a config.json names; None where it names none.

    Raises ValueError for a name that is none of them, CheckpointError where it is no list of names.
    """
    names = config.get("architectures")
    if not names and (names is None or isinstance(names, list)):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{directory / 'config.json'}: architectures must be a list of names, got {names!r:.80}")
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ValueError(
            f"{directory}: transformers {transformers.__version__} has no architecture {names[0]!r:.80}; upgrade it, "
            f"or {_BUILD_IT}"
        )
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or not cls.__module__.startswith(_OWN_MODELS):
        raise ValueError(f"{directory}: {names[0]!r:.80} of transformers is no model; correct architectures")
    return cls


def leave_out_absent_attention(transformers: Any, config: Any) -> None:
    """Give a config the default attention where it asks for a flash attention that is not installed.

    transformers would fetch a kernel of the hub in its place.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, inside.SUB_CONFIGS, ()))):
        name = getattr(part, inside.ATTENTION, None)
        if isinstance(name, str) and name.startswith("flash_attention_") and not _is_installed(transformers, name):
            logger.warning("%s is not installed; the default attention takes its place", name)
            setattr(part, inside.ATTENTION, None)


def _is_installed(transformers: Any, name: str) -> bool:
    test = getattr(transformers.utils, inside.FLASH_TEST.format(name.rpartition("_")[2]), None)
    return bool(test and test())


def _implementations(value: Any) -> Iterator[tuple[str, str]]:
    """Every text under a key that chooses an implementation, at any depth."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(key, str) and "_implementation" in key:
            yield from ((key, name) for name in _texts(inner))
        yield from _implementations(inner)


def _texts(value: Any) -> list[str]:
    found = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return [text for text in found if isinstance(text, str)]
