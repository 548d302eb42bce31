"""Perplexity of a language model on a text, and its distance from a reference model over the same windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.evaluation.intervals import bootstrap_interval

WINDOW = 256  # tokens
MAX_TOKENS = 40_960
BATCH = 8  # windows a forward pass

Progress = Callable[[int, int], None]  # called after each batch: tokens read so far, and in all


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, over `tokens` tokens that were read in `seconds`.

    interval: 95 % bounds by the spread between windows; None for a single one.
    """

    perplexity: float
    tokens: int
    seconds: float
    interval: tuple[float, float] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Comparison:
    """A model beside a reference. kl_divergence: KL(reference || model), nats a token. top1_agreement: 0 to 1.

    Intervals are 95 % bounds by the spread between windows; None for a single one. ratio_interval: of the model's
    perplexity over that of the reference, which the spread of the text itself does not widen.
    """

    model: Perplexity
    reference: Perplexity
    kl_divergence: float
    top1_agreement: float
    kl_interval: tuple[float, float] | None = None
    ratio_interval: tuple[float, float] | None = None


def perplexity(
    model: nn.Module,
    token_ids: Sequence[int] | Tensor,
    window: int = WINDOW,
    max_tokens: int = MAX_TOKENS,
    batch: int = BATCH,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Perplexity over the first max_tokens tokens, cut into windows that are each predicted on their own.

    model: in eval mode; maps ids [B, T] to logits [B, T, V] or to an object that has them. The first token of a window
    is not predicted. batch: windows a forward pass.
    Raises ValueError for fewer than two tokens, or token ids that the model does not have.
    """
    windows = cut_windows(token_ids, window, max_tokens, batch)
    total = sum(ids.numel() for ids in windows)
    run = _Run(model)
    for ids in windows:
        run.read(ids)
        progress(run.tokens, total)
    return run.result()


def compare(
    model: nn.Module,
    reference: nn.Module,
    token_ids: Sequence[int] | Tensor,
    window: int = WINDOW,
    max_tokens: int = MAX_TOKENS,
    batch: int = BATCH,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Both perplexities, the mean KL divergence and the share of equal first choices, over the windows of `perplexity`.

    Holds the logits of one batch of windows of each model at a time.
    Raises ValueError as `perplexity` does, and when the two models predict vocabularies of different size.
    """
    windows = cut_windows(token_ids, window, max_tokens, batch)
    total = sum(ids.numel() for ids in windows)
    ours, theirs = _Run(model), _Run(reference)
    divergences: list[float] = []
    equal = 0
    for ids in windows:
        logits, expected = ours.read(ids), theirs.read(ids)
        if logits.shape[-1] != expected.shape[-1]:
            raise ValueError(
                f"the model predicts {logits.shape[-1]} tokens, the reference {expected.shape[-1]}; "
                "compare models that share a vocabulary"
            )
        for window_logits, window_expected in zip(logits, expected, strict=True):  # few, for float32 copies are large
            nats, same = _distance(window_logits, window_expected.to(window_logits.device))
            divergences.append(nats)
            equal += same
        progress(ours.tokens, total)
    divergence, agreement = sum(divergences) / ours.predicted, equal / ours.predicted
    interval = bootstrap_interval(divergences, ours.counts)
    ratio = _exp_both(bootstrap_interval([a - b for a, b in zip(ours.losses, theirs.losses, strict=True)], ours.counts))
    return Comparison(ours.result(), theirs.result(), divergence, agreement, interval, ratio)


def cut_windows(token_ids: Sequence[int] | Tensor, window: int, max_tokens: int, batch: int) -> list[Tensor]:
    """Windows of ids in batches [B, window], then what is left over, if it holds a token to predict, as [1, T].

    Raises ValueError for fewer than two tokens, and for a window, max_tokens or batch that is too small.
    """
    for name, value, least in (("window", window, 2), ("max_tokens", max_tokens, 2), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)[:max_tokens]
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"perplexity needs a text of at least 2 tokens, got {ids.numel()}; give a longer text")
    whole = len(ids) // window * window
    batches = list(ids[:whole].view(-1, window).split(batch)) if whole else []
    return [*batches, ids[None, whole:]] if len(ids) - whole >= 2 else batches


class _Run:
    """One model's pass over a text: sums of loss, tokens and time."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.losses: list[float] = []  # a sum for each window
        self.counts: list[int] = []  # of the tokens that were predicted in it
        self.loss = self.seconds = 0.0
        self.tokens = self.predicted = 0

    def read(self, ids: Tensor) -> Tensor:
        """Logits [B, T - 1, V] of every token of the windows ids [B, T] but their first."""
        _check_ids(ids, _input_vocabulary(self.model))
        ids = ids.to(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            logits = _logits(self.model, ids)[:, :-1]
            _check_ids(ids, logits.shape[-1])
            # Summed by window and read back, which also waits for the device.
            losses = [_loss(row, targets) for row, targets in zip(logits, ids[:, 1:], strict=True)]
        self.seconds += time.perf_counter() - start
        self.loss += sum(losses)
        self.losses += losses
        self.counts += [ids.shape[1] - 1] * len(losses)
        self.tokens += ids.numel()
        self.predicted += ids[:, 1:].numel()
        return logits

    def result(self) -> Perplexity:
        interval = _exp_both(bootstrap_interval(self.losses, self.counts))
        return Perplexity(_exp(self.loss / self.predicted), self.tokens, self.seconds, interval)


def _exp_both(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (_exp(bounds[0]), _exp(bounds[1]))


def _exp(mean: float) -> float:
    value = math.exp(mean) if mean < 700 else math.inf  # exp(710) is no float
    return value if mean == mean else math.nan


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    config = getattr(model, "config", None)
    options = {"use_cache": False} if hasattr(config, "use_cache") else {}  # no window is continued
    output: Any = model(ids, **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        expected = f"[{ids.shape[0]}, {ids.shape[1]}, V]"
        raise ValueError(f"{type(model).__name__}: expected logits {expected}, got {found}; is it a language model?")
    return logits


def _loss(logits: Tensor, targets: Tensor) -> float:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


def _distance(logits: Tensor, expected: Tensor) -> tuple[float, int]:
    """Sum over tokens of KL(expected || logits) in nats, and the number of tokens with the same first choice."""
    divergence = nn.functional.kl_div(
        logits.float().log_softmax(-1), expected.float().log_softmax(-1), reduction="sum", log_target=True
    )
    return divergence.item(), int((logits.argmax(-1) == expected.argmax(-1)).sum())


def _input_vocabulary(model: nn.Module) -> int | None:
    """Number of tokens that a model can read, where it says so."""
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = get_embeddings() if callable(get_embeddings) else None
    return getattr(embeddings, "num_embeddings", None)


def _check_ids(ids: Tensor, vocabulary: int | None) -> None:
    largest = int(ids.max())
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"token id {largest} is outside of the model's vocabulary of {vocabulary}; "
            "the tokenizer belongs to another model"
        )
