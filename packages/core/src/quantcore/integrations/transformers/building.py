"""Building architectures and tokenizers through transformers (extra `transformers`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from quantcore._optional import require
from quantcore.checkpoints.files import stored_dtype
from quantcore.checkpoints.read import read_config
from quantcore.errors import CheckpointError
from quantcore.quantization_config import as_dtype


def build_model(directory: Path) -> nn.Module:
    """The model that config.json's `architectures` names, with the weights of whatever device context is active.

    Raises MissingExtraError without transformers, ValueError for an architecture or a dtype that it does not have,
    CheckpointError for a config.json that it does not take.
    """
    transformers = require("transformers", "transformers")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json, which names the architecture; put the model's own there")
    with _config_errors(directory):
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
    from huggingface_hub.errors import StrictDataclassError

    with _config_errors(directory):
        try:
            return transformers.AutoTokenizer.from_pretrained(directory)
        except StrictDataclassError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower for a damaged file
            raise ValueError(f"{directory} holds no tokenizer that loads; copy the model's tokenizer there") from error


@contextlib.contextmanager
def _config_errors(directory: Path) -> Iterator[None]:
    """A block in which values that a config class refuses are a CheckpointError that names the file.

    Raises ValueError for a dtype that torch does not have.
    """
    from huggingface_hub.errors import StrictDataclassError

    as_dtype(stored_dtype(read_config(directory)), f"{directory / 'config.json'}: dtype")
    try:
        yield
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory / 'config.json'} is no config of transformers: {reason}") from error
