"""Calibration data: from texts, token ids or model inputs to the inputs that a model is run with."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.calibration.datasets import DATASETS, check_named, named_texts
from quantcore.checkpoints.write import parse_size
from quantcore.plugins.manager import plugins

if TYPE_CHECKING:
    from quantcore.calibration.progress import Progress

logger = logging.getLogger(__name__)

ModelInputs = dict[str, Any]  # keyword arguments of the model's forward

SAMPLES = 128
SEQLEN = 2048
_BATCH_TOKENS = 2048  # tokens a forward pass where nothing else is asked for
_PROBE_TOKENS = 16
_LONGEST_NAME = 1024  # of a file, with its folders
_TEXT_FILES = (".txt", ".text", ".md", ".rst", ".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Calibration:
    """Data to calibrate with, and how it is run. What is None is chosen by the method, else as said here.

    data: texts (a string, a list of them, or a UTF-8 file by its name or pathlib.Path), token ids (a tensor [B, T], or
        a list of lists or of tensors [T]), or dicts of model inputs, each one forward pass; any iterable of those. Also
        the name of a customary data set: "wikitext2", "c4", "c4-new" or "pileval", which needs the package datasets.
    tokenizer: for texts; called as those of transformers are, or a folder or hub id that holds one.
    samples: rows of tokens, or dicts, that are used (128).
    seqlen: tokens of a row (2048, or what the model can read). Texts are joined and cut, until there are enough rows;
        of a longer text, rows are taken at even distances. Rows of ids are shortened.
    batch_size: rows of a forward pass; rows of different length are never joined.
    device: where blocks are run and solved; the model itself may stay on the CPU.
    resume_dir: a folder for finished blocks, from which an interrupted run goes on.
    offload: "disk" or a folder keeps the activations between blocks in files there; None keeps them in memory.
    max_memory: bytes, or a size such as "8GB", for one block and what is measured and solved of it, from file to file:
        layers of a larger block, such as the experts of a mixture, are read and solved in turns, with the same result.
    progress: called as work advances.
    """

    data: Any
    tokenizer: Any = None
    samples: int | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    device: torch.device | str | None = None
    resume_dir: str | os.PathLike[str] | None = None
    offload: str | os.PathLike[str] | None = None
    max_memory: int | str | None = None
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError("calibration data is missing; give texts with a tokenizer, token ids, or model inputs")
        for name in ("samples", "seqlen", "batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.max_memory is not None:
            parse_size(self.max_memory, "max_memory")

    @classmethod
    def of(cls, data: Any, **settings: Any) -> Calibration:
        """data itself where it is a Calibration, else one of it; settings that are given are set on it."""
        given = {name: value for name, value in settings.items() if value is not None}
        return dataclasses.replace(data, **given) if isinstance(data, cls) else cls(data, **given)

    def filled(self, **defaults: Any) -> Calibration:
        """A copy in which settings that are None have the given values."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


def check_readable(data: Any) -> None:
    """Raise for the name of a data set or a file that cannot be read, before any work is done; other data passes.

    Raises MissingExtraError without the package that a data set needs, FileNotFoundError for a file that is not there,
    ValueError for one that is no text.
    """
    name = data[0] if isinstance(data, list | tuple) and len(data) == 1 else data
    if isinstance(name, str) and name in DATASETS:
        check_named(name)
    elif isinstance(name, os.PathLike) or (isinstance(name, str) and _is_file(name)):
        read_text(Path(name))


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError for one that cannot be read, ValueError for one that is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: byte {error.start} cannot be read; convert the file") from error


def model_inputs(calibration: Calibration, model: nn.Module) -> list[ModelInputs]:
    """The inputs of each forward pass, on the CPU.

    Raises TypeError for data of another kind, ValueError for none, for token ids that the model does not have, and for
    texts that are shorter than one row.
    """
    items = _items(calibration.data)
    first = next(items, None)
    if first is None:
        raise ValueError("calibration data is empty; give at least one text, row of token ids, or dict of model inputs")
    items = _chain(first, items)
    limit = calibration.samples or SAMPLES
    if isinstance(first, Mapping):
        passes = [dict(item) for item in islice(items, limit)]
    else:
        seqlen = _seqlen(calibration, model)
        rows = _text_rows(items, calibration, seqlen, limit) if isinstance(first, str) else _id_rows(items, seqlen)
        chosen = list(islice(rows, limit))
        if calibration.samples is not None and len(chosen) < calibration.samples:
            logger.warning("calibration data gives %d rows, %d were asked for", len(chosen), calibration.samples)
        passes = _batched(chosen, calibration.batch_size)
    for inputs in passes:
        _check_ids(inputs, model)
    return passes


def shortened(inputs: ModelInputs) -> ModelInputs:
    """A little of a pass, to see how the model runs: the first tokens of its first row, where it is token ids alone."""
    return {"input_ids": inputs["input_ids"][:1, :_PROBE_TOKENS]} if set(inputs) == {"input_ids"} else inputs


def token_count(passes: Sequence[ModelInputs]) -> int:
    """Tokens in all passes; 0 for models that read no token ids."""
    return sum(inputs["input_ids"].numel() for inputs in passes if isinstance(inputs.get("input_ids"), Tensor))


def row_count(passes: Sequence[ModelInputs]) -> int:
    """Rows in all passes; one for a pass without a batch of tokens."""
    firsts = [next((value for value in inputs.values() if isinstance(value, Tensor)), None) for inputs in passes]
    return sum(first.shape[0] if first is not None and first.ndim > 1 else 1 for first in firsts)


def padding_mask(inputs: ModelInputs) -> Tensor | None:
    """Which tokens of a pass count, [B, T] bool, where its attention mask excludes some."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask.all()):
        return None
    return mask.bool()


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, os.PathLike):
        return iter([read_text(Path(data))])
    if isinstance(data, list | tuple) and len(data) == 1 and isinstance(data[0], str):
        data = data[0]
    if isinstance(data, str) and data in DATASETS:
        return named_texts(data)
    if isinstance(data, str) and _is_file(data):
        return iter([read_text(Path(data))])
    if isinstance(data, str | Mapping):
        return iter([data])
    if isinstance(data, Tensor):
        return iter(data.reshape(-1, data.shape[-1])) if data.ndim and data.numel() else iter(())
    if isinstance(data, Sequence) and data and isinstance(data[0], int):
        return iter([data])
    if isinstance(data, Iterable):
        return iter(data)
    raise TypeError(f"calibration data is a {type(data).__name__}; give texts, token ids, or dicts of model inputs")


def _is_file(text: str) -> bool:
    """Whether a text is the name of a file.

    Raises FileNotFoundError for what can only be one and is not there, ValueError for a folder, pipe or device.
    """
    is_name = 0 < len(text) < _LONGEST_NAME and "\n" not in text and "\0" not in text
    if not is_name or Path(text).is_file():
        return is_name
    if os.sep in text and Path(text).exists():
        raise ValueError(f"calibration data: {text!r} is no regular file; give a text file, or texts")
    if Path(text).suffix.lower() in _TEXT_FILES and len(text.split()) == 1:
        raise FileNotFoundError(f"calibration data: there is no file {text!r}; correct the name, or give texts")
    return False


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _seqlen(calibration: Calibration, model: nn.Module) -> int:
    config = getattr(model, "config", None)
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    most = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if calibration.seqlen is None:
        return min(SEQLEN, most or SEQLEN)
    if most is not None and calibration.seqlen > most:
        raise ValueError(f"seqlen {calibration.seqlen} is more than the {most} positions of {type(model).__name__}")
    return calibration.seqlen


def _text_rows(texts: Iterator[Any], calibration: Calibration, seqlen: int, limit: int) -> list[Tensor]:
    """Rows of seqlen tokens, spread evenly over as many joined texts as give enough."""
    tokenizer = _tokenizer(calibration)
    pieces: list[Tensor] = []
    missing = limit * seqlen
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"calibration data mixes texts with {type(text).__name__}; give one kind")
        pieces.append(_encode(tokenizer, text))
        missing -= len(pieces[-1])
        if missing <= 0:
            break
    ids = torch.cat(pieces)
    whole = len(ids) // seqlen
    if not whole:
        raise ValueError(
            f"calibration text has {len(ids)} tokens, less than one row of seqlen {seqlen}; give more text, or a "
            "smaller seqlen"
        )
    rows = ids[: whole * seqlen].view(whole, seqlen)
    return [rows[index * whole // limit] for index in range(limit)] if whole > limit else list(rows)


def _tokenizer(calibration: Calibration) -> Any:
    tokenizer = calibration.tokenizer
    if tokenizer is None:
        raise ValueError("calibration data is text, which needs a tokenizer; pass tokenizer=, or give token ids")
    if isinstance(tokenizer, str | os.PathLike):
        from quantcore.checkpoints.read import resolve

        return plugins().hook.quantcore_tokenizer(directory=resolve(tokenizer))
    return tokenizer


def _encode(tokenizer: Any, text: str) -> Tensor:
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.as_tensor(encoded, dtype=torch.int64).reshape(-1)


def _id_rows(rows: Iterator[Any], seqlen: int) -> Iterator[Tensor]:
    for row in rows:
        ids = torch.as_tensor(row)
        if ids.dtype.is_floating_point or ids.dtype == torch.bool or not ids.numel():
            raise TypeError(f"calibration data: expected token ids, got {ids.dtype} {list(ids.shape)}")
        for single in ids.reshape(-1, ids.shape[-1]):
            yield single[:seqlen].to(torch.int64)


def _batched(rows: Sequence[Tensor], batch_size: int | None) -> list[ModelInputs]:
    """Neighbours of one length as [B, T]."""
    batches: list[list[Tensor]] = []
    for row in rows:
        most = batch_size or max(1, _BATCH_TOKENS // len(row))
        if batches and len(batches[-1]) < most and len(batches[-1][0]) == len(row):
            batches[-1].append(row)
        else:
            batches.append([row])
    return [{"input_ids": torch.stack(batch)} for batch in batches]


def _check_ids(inputs: ModelInputs, model: nn.Module) -> None:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    vocabulary = getattr(get_embeddings(), "num_embeddings", None) if callable(get_embeddings) else None
    ids = inputs.get("input_ids")
    if vocabulary is None or not isinstance(ids, Tensor) or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration data: token id {low if low < 0 else high} is outside of the model's vocabulary of "
            f"{vocabulary}; the tokenizer belongs to another model"
        )
