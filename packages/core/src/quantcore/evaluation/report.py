"""The evaluation of a checkpoint folder: what `quantcore eval` prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcore.checkpoints.model import load
from quantcore.checkpoints.read import Checkpoint, resolve
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


@dataclass(frozen=True)
class Evaluation:
    """Quality, speed and size of a checkpoint; the fields after `disk_bytes` are None without a reference."""

    perplexity: float
    tokens: int
    tokens_per_second: float
    disk_bytes: int
    reference_perplexity: float | None = None
    reference_tokens_per_second: float | None = None
    reference_disk_bytes: int | None = None
    kl_divergence: float | None = None  # nats a token
    top1_agreement: float | None = None  # 0 to 1


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
    progress as in `perplexity`. Needs quantcore[transformers].
    Raises ValueError for a text of fewer than two tokens and for models whose vocabularies do not match.
    """
    directory = resolve(directory)
    reference = None if reference is None else resolve(reference)
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
    return _compared(directory, reference, compare(model, original, token_ids, window, max_tokens, batch, progress))


def encode(directory: Path, text: str) -> list[int]:
    """Token ids of a text by the tokenizer of a checkpoint folder, without special tokens."""
    encoded = load_tokenizer(directory)(text, add_special_tokens=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def disk_bytes(directory: Path) -> int:
    """Size of a checkpoint's safetensors files."""
    files = {header.file for header in Checkpoint(directory).headers.values()}
    return sum((directory / file).stat().st_size for file in files)


def _evaluation(directory: Path, measured: Perplexity) -> Evaluation:
    return Evaluation(measured.perplexity, measured.tokens, measured.tokens_per_second, disk_bytes(directory))


def _compared(directory: Path, reference: Path, measured: Comparison) -> Evaluation:
    return Evaluation(
        perplexity=measured.model.perplexity,
        tokens=measured.model.tokens,
        tokens_per_second=measured.model.tokens_per_second,
        disk_bytes=disk_bytes(directory),
        reference_perplexity=measured.reference.perplexity,
        reference_tokens_per_second=measured.reference.tokens_per_second,
        reference_disk_bytes=disk_bytes(reference),
        kl_divergence=measured.kl_divergence,
        top1_agreement=measured.top1_agreement,
    )
