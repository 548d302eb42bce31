"""Building architectures and tokenizers through transformers (extra `transformers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from quantcore._optional import require


def build_model(directory: Path) -> nn.Module:
    """The model that config.json's `architectures` names, with the weights of whatever device context is active.

    Raises MissingExtraError without transformers, ValueError for an architecture that it does not have.
    """
    transformers = require("transformers", "transformers")
    config = transformers.AutoConfig.from_pretrained(directory)
    vars(config).pop("quantization_config", None)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
    if cls is None:
        raise ValueError(
            f"{directory}: transformers {transformers.__version__} has no architecture {names[0]!r}; upgrade it"
        )
    model: nn.Module = cls._from_config(config) if names else cls.from_config(config)
    if (directory / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises MissingExtraError without transformers, ValueError when the folder holds none that can be loaded.
    """
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory} holds no tokenizer that loads; copy the model's tokenizer there") from error
