"""The evaluation of checkpoint folders: what `quantcore eval` and `quantcore compare` print."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from quantcore.checkpoints.devices import check_device
from quantcore.checkpoints.read import Checkpoint, positions, quantization_dict, read_config, resolve
from quantcore.checkpoints.stream import slots
from quantcore.evaluation.perplexity import (
    BATCH,
    MAX_TOKENS,
    WINDOW,
    Comparison,
    Perplexity,
    Progress,
    compare,
    cut_windows,
    perplexity,
)
from quantcore.integrations.transformers import load_tokenizer
from quantcore.plugins.known import normalize_method
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.model import quantize
from quantcore.workflows.model import load


@dataclass(frozen=True)
class Evaluation:
    """Quality, speed and size of a checkpoint; what needs a reference is None without one.

    Intervals are 95 % bounds by the spread between windows of the text; None where there is a single window.
    """

    perplexity: float
    tokens: int
    tokens_per_second: float
    disk_bytes: int
    reference_perplexity: float | None = None
    reference_tokens_per_second: float | None = None
    reference_disk_bytes: int | None = None
    kl_divergence: float | None = None  # nats a token
    top1_agreement: float | None = None  # 0 to 1
    perplexity_interval: tuple[float, float] | None = None
    reference_perplexity_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None  # of perplexity / reference_perplexity


def evaluate(
    directory: str | os.PathLike[str],
    text: str,
    *,
    reference: str | os.PathLike[str] | None = None,
    window: int = WINDOW,
    max_tokens: int = MAX_TOKENS,
    batch: int = BATCH,
    device: Any = None,
    dtype: str | None = None,
    report: Callable[[str], None] = lambda step: None,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Perplexity, speed and size of a checkpoint on a text, and its distance from the checkpoint reference, if given.

    device, dtype: as in `quantcore.load`, for both models. report: called with a sentence at each step,
    progress as in `perplexity`. Needs the extra transformers.
    Raises ValueError for a text of fewer than two tokens and for models whose vocabularies do not match.
    """
    check_device(device, "device")
    directory = resolve(directory)
    reference = None if reference is None else resolve(reference)
    for folder in (directory, *([] if reference is None else [reference])):
        _check_window(folder, window, max_tokens)
    token_ids = encode(directory, text)
    tokens = sum(ids.numel() for ids in cut_windows(token_ids, window, max_tokens, batch))
    report(f"loading {directory}")
    model = load(directory, device_map=device, dtype=dtype)
    if reference is None:
        report(f"reading {tokens:,} tokens")
        return _evaluation(directory, perplexity(model, token_ids, window, max_tokens, batch, progress))
    report(f"loading {reference}")
    original = load(reference, device_map=device, dtype=dtype)
    report(f"reading {tokens:,} tokens with both models")
    measured = compare(model, original, token_ids, window, max_tokens, batch, progress)
    return _compared(disk_bytes(directory), disk_bytes(reference), measured)


def evaluate_beside(
    reference: str | os.PathLike[str],
    candidates: Iterable[str | os.PathLike[str] | QuantizationConfigMixin],
    text: str,
    *,
    window: int = WINDOW,
    max_tokens: int = MAX_TOKENS,
    batch: int = BATCH,
    device: Any = None,
    dtype: str | None = None,
    report: Callable[[str], None] = lambda step: None,
    progress: Progress = lambda done, total: None,
    examine: Callable[[nn.Module, nn.Module], None] = lambda model, reference: None,
) -> Iterator[Evaluation]:
    """What `evaluate` gives for each candidate beside one reference, which stays loaded.

    candidates: checkpoint folders, or configs of methods that need no data, with which the reference is quantized in
    memory; `disk_bytes` is then what its tensors take. examine: called with each model and the reference once they are
    measured, to look at more.
    """
    check_device(device, "device")
    reference = resolve(reference)
    _check_window(reference, window, max_tokens)
    token_ids = encode(reference, text)
    report(f"loading {reference}")
    original = load(reference, device_map=device, dtype=dtype)
    for candidate in candidates:
        model = None  # the one before goes before the next comes
        if isinstance(candidate, QuantizationConfigMixin):
            report(f"quantizing {reference} with {normalize_method(candidate.quant_method)}")
            model = quantize(load(reference, device_map=device, dtype=dtype), candidate)
            size = tensor_bytes(model)
        else:
            report(f"loading {candidate}")
            model, size = load(candidate, device_map=device, dtype=dtype), disk_bytes(resolve(candidate))
        measured = compare(model, original, token_ids, window, max_tokens, batch, progress)
        examine(model, original)
        yield _compared(size, disk_bytes(reference), measured)


def _check_window(directory: Path, window: int, max_tokens: int) -> None:
    """Raise ValueError for windows that are longer than what the model in a folder reads: figures would be wrong."""
    most = positions(read_config(directory))
    if most is not None and min(window, max_tokens) > most:
        raise ValueError(f"window {window} is more than the {most} positions of {directory}; give a smaller one")


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of a model, shared ones once."""
    return sum(slot.tensor.nbytes for slot in {id(slot.tensor): slot for slot in slots(model).values()}.values())


def encode(directory: Path, text: str) -> list[int]:
    """Token ids of a text by the tokenizer of a checkpoint folder, without special tokens."""
    quantization_dict(read_config(directory))  # what is wrong with config.json is told first, and by us
    encoded = load_tokenizer(directory)(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def disk_bytes(directory: Path) -> int:
    """Size of the files that hold a checkpoint's weights; of the one file of a container."""
    if directory.is_file():
        return directory.stat().st_size
    files = {header.file for header in Checkpoint(directory).headers.values()}
    return sum((directory / file).stat().st_size for file in files)


def _evaluation(directory: Path, measured: Perplexity) -> Evaluation:
    return Evaluation(
        measured.perplexity,
        measured.tokens,
        measured.tokens_per_second,
        disk_bytes(directory),
        perplexity_interval=measured.interval,
    )


def _compared(size: int, reference_size: int, measured: Comparison) -> Evaluation:
    return Evaluation(
        perplexity=measured.model.perplexity,
        tokens=measured.model.tokens,
        tokens_per_second=measured.model.tokens_per_second,
        disk_bytes=size,
        reference_perplexity=measured.reference.perplexity,
        reference_tokens_per_second=measured.reference.tokens_per_second,
        reference_disk_bytes=reference_size,
        kl_divergence=measured.kl_divergence,
        top1_agreement=measured.top1_agreement,
        perplexity_interval=measured.model.interval,
        reference_perplexity_interval=measured.reference.interval,
        kl_interval=measured.kl_interval,
        ratio_interval=measured.ratio_interval,
    )
