"""Building architectures and tokenizers through transformers (extra `transformers`)."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantcore import transformers_names as inside
from quantcore._optional import require
from quantcore.checkpoints.empty import default_dtype
from quantcore.checkpoints.files import GENERATION_NAME, stored_dtype
from quantcore.checkpoints.opening import open_source
from quantcore.checkpoints.read import read_config
from quantcore.errors import CheckpointError, QuantcoreError
from quantcore.integrations.transformers.limits import Holdings, WithinHoldings, check_counts
from quantcore.integrations.transformers.trust import check_config, leave_out_absent_attention, model_class
from quantcore.quantization_config import as_dtype

# What a value of the wrong type or size can raise in the code of a config or a model.
_OF_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def build_model(directory: Path, holdings: Holdings | None = None) -> nn.Module:
    """The model that config.json's `architectures` names, with the weights of whatever device context is active.

    holdings: what the weights take, which bounds what config.json may ask for; None for those that the folder holds.
    Raises MissingExtraError without transformers, ValueError for an architecture or a dtype that it does not have,
    CheckpointError for a config.json that it does not take, or that asks for code that is not its own.
    """
    transformers = require("transformers", "transformers")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json, which names the architecture; put the model's own there")
    stored = read_config(directory)
    check_config(transformers, directory, stored)
    cls = model_class(transformers, directory, stored)
    holdings = holdings or Holdings.of(directory)
    if holdings is not None:
        check_counts(directory, stored, holdings)
    with _config_errors(directory):
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        leave_out_absent_attention(transformers, config)
        with contextlib.nullcontext() if holdings is None else WithinHoldings(directory, holdings):
            model: nn.Module = _build(transformers, cls, config)
    if (directory / GENERATION_NAME).is_file() and hasattr(model, "generation_config"):
        model.generation_config = _generation_config(transformers, directory)
    return model


def _generation_config(transformers: Any, directory: Path) -> Any:
    """The settings of generate() that a folder holds. Raises CheckpointError naming their file for a damaged one."""
    try:
        return transformers.GenerationConfig.from_pretrained(directory)
    except (OSError, *_OF_VALUES) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        text = f"{directory / GENERATION_NAME} holds no settings of generate() ({reason:.400}); mend or remove it"
        raise CheckpointError(text) from error


def _build(transformers: Any, cls: Any, config: Any) -> Any:
    """A model of a config in the config's dtype. transformers would make that the default of the whole process."""
    wanted = as_dtype(config.dtype, "config.json: dtype")
    with contextlib.nullcontext() if wanted is None else default_dtype(wanted):
        if cls is not None:
            model = cls._from_config(config, dtype=None)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=None, trust_remote_code=False)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, inside.SUB_CONFIGS, ()))):
        if part is not None:
            part.dtype = wanted
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint folder, or of a container's file, whose side files are laid out in a folder.

    Raises MissingExtraError without transformers, CheckpointError when there is none that can be loaded.
    """
    if path.is_dir():
        return _tokenizer_in(path, path)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(open_source(path)) as source:
        for name, content in {**source.side_files, "config.json": json.dumps(dict(source.config)).encode()}.items():
            Path(folder, Path(name).name).write_bytes(content)
        return _tokenizer_in(Path(folder), path)


def _tokenizer_in(directory: Path, source: Path) -> Any:
    """The tokenizer of a folder. source: what errors name."""
    transformers = require("transformers", "transformers")
    from huggingface_hub.errors import StrictDataclassError

    with _config_errors(directory):
        try:
            return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except StrictDataclassError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower for a damaged file
            text = f"{source} holds no tokenizer that loads; copy the model's tokenizer there"
            raise CheckpointError(text) from error


@contextlib.contextmanager
def _config_errors(directory: Path) -> Iterator[None]:
    """A block in which what transformers raises for a config.json is a CheckpointError that names the file.

    Its classes check little, so that a value of the wrong type or size may fail anywhere in the code of a model.
    Raises ValueError for a dtype that torch does not have.
    """
    from huggingface_hub.errors import StrictDataclassError

    as_dtype(stored_dtype(read_config(directory)), f"{directory / 'config.json'}: dtype")
    try:
        yield
    except (QuantcoreError, torch.OutOfMemoryError):
        raise
    except (StrictDataclassError, *_OF_VALUES) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{directory / 'config.json'} is no config of transformers: {reason:.400}") from error
